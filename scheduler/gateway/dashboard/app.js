// The page's start: the theme, the API key, and the feed that draws everything.

import { offerModels, prepareChat } from "./chat.js";
import { follow, writeKey } from "./feed.js";
import { drawLadder, measureRates } from "./ladder.js";
import { drawMemory, drawSavings, drawSecurity, drawTotals, drawWorkers } from "./panels.js";
import { drawRequests } from "./waterfall.js";

const THEME_ITEM = "glowplug-theme";
const find = (id) => document.getElementById(id);

function prepareTheme() {
  const stored = localStorage.getItem(THEME_ITEM);
  if (stored) document.documentElement.dataset.theme = stored;
  find("theme").addEventListener("click", () => {
    const isDark = document.documentElement.dataset.theme
      ? document.documentElement.dataset.theme === "dark"
      : matchMedia("(prefers-color-scheme: dark)").matches;
    document.documentElement.dataset.theme = isDark ? "light" : "dark";
    localStorage.setItem(THEME_ITEM, document.documentElement.dataset.theme);
  });
}

function drawAll(live) {
  const rates = measureRates(live);
  drawTotals(find("totals"), live, rates);
  drawLadder(find("ladder"), live, rates);
  drawWorkers(find("workers"), live);
  drawMemory(find("memory"), live);
  drawSavings(find("savings"), live);
  drawSecurity(find("security"), live);
  drawRequests(find("requests"), find("waterfall"), live);
  offerModels(find("model"), live);
  if (!live.status) onState("lost", "no scheduler reports");
}

function onState(state, text) {
  const line = find("connection");
  if (line.className !== state || line.textContent !== text) {
    line.className = state;
    line.textContent = text;
  }
  find("key-form").hidden = state !== "locked";
  if (state === "locked") find("key-error").textContent = text;
}

prepareTheme();
prepareChat(find("chat"), {
  model: find("model"), prompt: find("prompt"), maxTokens: find("max-tokens"),
  send: find("send"), stop: find("stop"), wake: find("wake"), answer: find("answer"),
});
find("key-form").addEventListener("submit", (submitted) => {
  submitted.preventDefault();
  writeKey(find("key").value);
  find("key").value = "";
  follow(drawAll, onState);
});
follow(drawAll, onState);
