// The chat box: one message to a model, its wake in words, its answer as it comes.

import { authorised, describeRefusal, readEvents } from "./feed.js";
import { formatMs } from "./format.js";
import { selectRequest } from "./waterfall.js";

const STAGES = { queued: "queued", spawning: "starting a worker", verifying: "verifying the snapshot", restoring: "restoring", ready: "ready" };

export function offerModels(select, live) {
  const names = (live.status?.models ?? []).filter((model) => !model.error).map((model) => model.name);
  if (names.join("\n") === [...select.options].map((option) => option.value).join("\n")) return;
  const chosen = select.value;
  select.replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
}

export function prepareChat(form, parts) {
  let abort = null;
  form.addEventListener("submit", async (submitted) => {
    submitted.preventDefault();
    abort?.abort();
    abort = new AbortController();
    parts.send.disabled = true;
    parts.stop.disabled = false;
    try {
      await ask(parts, abort.signal);
    } catch (error) {
      parts.wake.textContent = error.name === "AbortError" ? "stopped" : error.message;
    } finally {
      parts.send.disabled = false;
      parts.stop.disabled = true;
    }
  });
  parts.stop.addEventListener("click", () => abort?.abort());
}

async function ask(parts, signal) {
  const began = performance.now();
  parts.answer.textContent = "";
  parts.wake.textContent = "sent";
  const body = {
    model: parts.model.value,
    messages: [{ role: "user", content: parts.prompt.value }],
    max_tokens: Number(parts.maxTokens.value),
    temperature: 0, // small models wander when they are sampled
    stream: true,
  };
  const response = await fetch("/v1/chat/completions", {
    method: "POST", headers: authorised({ "Content-Type": "application/json" }), body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw new Error(await describeRefusal(response));
  let first = 0, tokens = 0;
  for await (const event of readEvents(response)) {
    if (event.comment !== undefined) { if (!first) parts.wake.textContent = describeWake(event.comment); continue; }
    if (event.data === "[DONE]") break;
    const chunk = JSON.parse(event.data);
    if (chunk.error) throw new Error(chunk.error.message);
    const text = chunk.choices?.[0]?.delta?.content;
    if (!text) continue;
    first ||= performance.now();
    tokens += 1;
    parts.answer.append(text);
    parts.answer.scrollTop = parts.answer.scrollHeight;
    parts.wake.textContent = `first token after ${formatMs(first - began)}`;
  }
  const seconds = (performance.now() - first) / 1000;
  const rate = tokens > 1 && seconds > 0 ? `, then ${((tokens - 1) / seconds).toFixed(0)} pieces/s` : "";
  parts.wake.textContent = first ? `first token after ${formatMs(first - began)}${rate}` : "the answer is empty";
  selectRequest((response.headers.get("X-Request-Id") ?? "").split(",")[0]);
}

/** `waking model=m stage=verifying eta_ms=60` in words. */
function describeWake(comment) {
  const facts = Object.fromEntries([...comment.matchAll(/(\w+)=(\S+)/g)].map((match) => [match[1], match[2]]));
  if (!facts.stage) return "the model is awake";
  const eta = Number(facts.eta_ms) > 0 ? `, about ${formatMs(Number(facts.eta_ms))} left` : "";
  return `waking: ${STAGES[facts.stage] ?? facts.stage}${eta}`;
}
