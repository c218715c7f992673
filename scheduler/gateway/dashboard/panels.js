// The panels of numbers: totals, workers, memory, savings, security.

import { element, empty, formatBytes, formatClock, formatSeconds, table } from "./format.js";

export function drawTotals(root, live, ratesByModel) {
  const models = live.status?.models ?? [];
  const sum = (pick) => models.reduce((total, model) => total + pick(model), 0);
  const rate = [...ratesByModel.values()].reduce((total, each) => total + each, 0);
  const facts = [
    ["models", models.length],
    ["workers", sum((model) => model.workers)],
    ["in flight", sum((model) => model.in_flight)],
    ["queued", sum((model) => model.queued)],
    ["tokens/s", rate.toFixed(0)],
    ["streams here", live.open_streams],
  ];
  root.replaceChildren(...facts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
}

export function drawWorkers(root, live) {
  const workers = live.status?.workers ?? [];
  if (!workers.length) {
    const isStarting = (live.status?.models ?? []).some((model) => model.workers > 0);
    root.replaceChildren(empty(isStarting ? "One is starting." : "None: every model is at zero and costs nothing."));
    return;
  }
  const columns = [{ title: "Model" }, { title: "State" }, { title: "Node" }, { title: "Running", number: true },
    { title: "Waiting", number: true }, { title: "KV cache", number: true },
    { title: "Prompts cached", number: true }, { title: "Private", number: true }, { title: "Tokens", number: true }];
  root.replaceChildren(table(`${workers.length} running`, columns, workers.map((worker) => [
    worker.model, worker.state, worker.node_id, String(worker.num_running), String(worker.num_waiting),
    worker.kv_budget_bytes ? `${formatBytes(worker.kv_used_bytes)} of ${formatBytes(worker.kv_budget_bytes)}` : "–",
    worker.prompt_tokens ? `${(100 * worker.cached_tokens / worker.prompt_tokens).toFixed(0)} %` : "–",
    formatBytes(worker.private_bytes), String(worker.tokens_generated)])));
}

function gpuLabel(gpu) {
  return gpu.instance === undefined ? `${gpu.index}` : `${gpu.index}:${gpu.instance}`;
}

export function drawMemory(root, live) {
  const nodes = live.status?.nodes ?? [];
  if (!nodes.length) { root.replaceChildren(empty("No node reports.")); return; }
  root.replaceChildren(...nodes.flatMap((node) => {
    const sealed = Object.values(node.sealed_bytes).reduce((total, bytes) => total + bytes, 0);
    const own = (live.status.workers ?? []).filter((worker) => worker.node_id === node.node_id);
    const hot = own.reduce((total, worker) => total + worker.private_bytes, 0);
    const rows = [["T4 hot: workers' own", hot], ["T2 sealed snapshots", sealed], ["available", node.memory_available_bytes]];
    const bars = rows.flatMap(([name, bytes], index) => [element("span", {}, name),
      element("progress", { max: node.memory_total_bytes, value: bytes, class: ["T4", "T2", "T1"][index], "aria-label": `${name} on ${node.node_id}` }),
      element("span", {}, formatBytes(bytes))]);
    const gpus = (node.gpus ?? []).flatMap((gpu) => [element("span", {}, `GPU ${gpuLabel(gpu)}${gpu.fault ? ", fault" : ""}`),
      element("progress", { max: gpu.total_bytes, value: gpu.total_bytes - gpu.free_bytes, class: "T4", title: gpu.fault ?? gpu.name, "aria-label": `memory used of GPU ${gpuLabel(gpu)} of ${node.node_id}` }),
      element("span", {}, formatBytes(gpu.total_bytes - gpu.free_bytes))]);
    return [element("p", { class: "hint" }, `${node.node_id}, ${node.backend}, ${formatBytes(node.memory_total_bytes)} in all`), element("div", { class: "bars" }, ...bars, ...gpus)];
  }));
}

export function drawSavings(root, live) {
  const models = live.status?.models ?? [];
  const known = models.reduce((total, model) => total + model.known_s, 0);
  const awake = models.reduce((total, model) => total + model.awake_s, 0);
  if (!known) { root.replaceChildren(empty("Nothing observed yet.")); return; }
  const saved = Math.max(0, known - awake);
  const columns = [{ title: "Model" }, { title: "Awake", number: true }, { title: "Saved", number: true }];
  root.replaceChildren(
    element("p", {}, element("span", { class: "big" }, formatSeconds(saved)), ` of worker time not spent (${(100 * saved / known).toFixed(1)} %)`),
    element("p", { class: "hint" }, "Against one worker a model kept warm since this scheduler started. On GPU machines these are GPU-seconds."),
    table("By model", columns, models.map((model) => [model.name, formatSeconds(model.awake_s), formatSeconds(Math.max(0, model.known_s - model.awake_s))])));
}

export function drawSecurity(root, live) {
  const counts = Object.entries(live.security_counts);
  if (!counts.length && !live.security_events.length) { root.replaceChildren(empty("None.")); return; }
  const columns = [{ title: "When" }, { title: "What" }, { title: "Model" }, { title: "Why" }];
  root.replaceChildren(
    element("p", { class: "hint" }, counts.map(([kind, count]) => `${kind}: ${count}`).join(" · ")),
    table("Newest first", columns, live.security_events.map((event) => [formatClock(event.at_s), event.kind, event.model, event.reason])));
}
