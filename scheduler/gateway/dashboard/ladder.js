// The temperature ladder: a rung a tier, a card a model. Cards are kept, so that only what changed moves.

import { element, formatBytes, formatSeconds } from "./format.js";

const TIERS = [
  ["T0", "remote", "object store"],
  ["T1", "disk", "nothing in memory"],
  ["T2", "host memory", "sealed, no process"],
  ["T3r", "released", "process, nothing on the device"],
  ["T3", "parked", "process, no weights on the device"],
  ["T4", "hot", "serving"],
];

/** A worker starts or restores, and none is ready yet. */
const WAKING = /^(?!.*ready).*(cold|restoring)/;
const cards = new Map(); // model -> {card, tier}
const rates = new Map(); // worker -> {tokens, at, rate}

/** Tokens a second of each model, from the workers' counters of two documents. */
export function measureRates(live) {
  const byModel = new Map();
  const seen = new Set();
  for (const worker of live.status?.workers ?? []) {
    seen.add(worker.worker_id);
    const before = rates.get(worker.worker_id);
    let rate = before?.rate ?? 0;
    if (before && worker.reported_at_s > before.at) {
      rate = Math.max(0, worker.tokens_generated - before.tokens) / (worker.reported_at_s - before.at);
    }
    if (!before || worker.reported_at_s > before.at) {
      rates.set(worker.worker_id, { tokens: worker.tokens_generated, at: worker.reported_at_s, rate });
    }
    byModel.set(worker.model, (byModel.get(worker.model) ?? 0) + rate);
  }
  for (const id of rates.keys()) if (!seen.has(id)) rates.delete(id);
  return byModel;
}

export function drawLadder(root, live, ratesByModel) {
  if (!root.firstChild) root.append(...TIERS.map(makeRung));
  const models = live.status?.models ?? [];
  for (const model of models) placeModel(root, model, ratesByModel.get(model.name) ?? 0);
  const names = new Set(models.map((model) => model.name));
  for (const [name, { card }] of cards) {
    if (!names.has(name)) { card.remove(); cards.delete(name); }
  }
}

function makeRung([tier, name, text]) {
  return element("div", { class: `rung ${tier}` },
    element("h3", {}, `${tier} ${name}`), element("p", {}, text), element("ul", { id: `rung-${tier}`, "aria-label": `Models at ${tier}, ${name}` }));
}

function placeModel(root, model, rate) {
  let known = cards.get(model.name);
  if (!known) { known = { card: element("li"), tier: null }; cards.set(model.name, known); }
  const waking = model.workers > 0 && WAKING.test(model.state);
  known.card.className = `model ${model.tier}${waking ? " waking" : ""}`;
  known.card.dataset.model = model.name;
  known.card.replaceChildren(...describeModel(model, rate, waking));
  if (known.tier !== model.tier) {
    known.tier = model.tier;
    root.querySelector(`#rung-${model.tier}`).append(known.card);
  }
}

function describeModel(model, rate, waking) {
  const line = (text, name) => element("p", { class: name }, text);
  const parts = [element("strong", {}, model.name)];
  if (model.error) return [...parts, line(model.error, "error")];
  if (waking) parts.push(line(model.state.includes("restoring") ? "waking: restoring" : "waking: starting a worker"));
  if (model.workers) {
    parts.push(line(`${model.workers} worker${model.workers > 1 ? "s" : ""} · ${model.in_flight} in flight · ${model.queued} queued`));
    if (rate >= 0.5) parts.push(line(`${rate.toFixed(0)} tokens/s`));
  } else if (model.in_flight) parts.push(line(`${model.in_flight} waiting`));
  if (model.sealed_bytes) parts.push(line(`${formatBytes(model.sealed_bytes)} verified in memory`));
  if (model.idle_for_s !== null) {
    const left = Math.max(0, model.idle_timeout_s - model.idle_for_s);
    parts.push(line(`sleeps in ${formatSeconds(left)}`),
      element("progress", { max: model.idle_timeout_s, value: left, "aria-label": `Idle timer of ${model.name}` }));
  }
  return parts;
}
