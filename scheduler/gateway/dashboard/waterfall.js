// The list of requests and the waterfall of one of them.

import { authorised, describeRefusal } from "./feed.js";
import { element, empty, formatClock, formatMs, table } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const MIN_WIDTH = 320, MAX_WIDTH = 640, ROW = 22, TOP = 8, LABEL = 82, RIGHT = 74;
const AFTER_READY = new Set(["claim", "tokenise", "prefill", "first_token", "publish", "first_byte"]);

let selected = null; // request id, or null: the newest cold start
let drawn = null;
let listed = "";

export function drawRequests(root, figure, live) {
  const traces = live.traces;
  const signature = traces.map((trace) => trace.request_id).join() + selected;
  if (signature === listed) return;
  listed = signature;
  if (!traces.length) { root.replaceChildren(empty("No request yet.")); figure.replaceChildren(); return; }
  const newest = traces.find((trace) => trace.cold_tier) ?? traces[0];
  const shown = traces.some((trace) => trace.request_id === selected) ? selected : newest.request_id;
  const columns = [{ title: "At" }, { title: "Model" }, { title: "Met" }, { title: "First byte", number: true }, { title: "Whole", number: true, roomy: true }, { title: "Phases" }];
  root.replaceChildren(table("Newest requests", columns, traces.slice(0, 8).map((trace) => {
    const button = element("button", { type: "button", "aria-label": `Show phases of the request of ${formatClock(trace.accepted_at_s)} to ${trace.model}` }, "show");
    button.addEventListener("click", () => { selected = trace.request_id; listed = ""; showTrace(figure, selected); drawRequests(root, figure, live); });
    const tier = trace.cold_tier ?? "T4";
    return [formatClock(trace.accepted_at_s), trace.model, element("span", { class: `badge ${tier}` }, trace.cold_tier ? `cold ${tier}` : "hot"),
      formatMs(trace.ttft_ms), formatMs(trace.total_ms), button];
  })));
  if (drawn !== shown) showTrace(figure, shown);
}

/** Select a request, for example the one that was just sent from this page. */
export function selectRequest(requestId) { selected = requestId; listed = ""; }

async function showTrace(figure, requestId) {
  drawn = requestId;
  const response = await fetch(`/admin/traces/${encodeURIComponent(requestId)}`, { headers: authorised() });
  if (drawn !== requestId) return;
  if (!response.ok) { figure.replaceChildren(empty(await describeRefusal(response))); return; }
  const width = Math.min(MAX_WIDTH, Math.max(MIN_WIDTH, figure.clientWidth)); // letters keep their size in a narrow window
  figure.replaceChildren(...drawTrace(await response.json(), width));
}

function svg(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function drawTrace(trace, fullWidth) {
  const origin = trace.marks.accepted;
  const phases = trace.phases.filter((phase) => phase.start in trace.marks && phase.end in trace.marks);
  const at = (mark) => Math.max(0, (trace.marks[mark] - origin) / 1e6);
  const total = Math.max(0.001, ...phases.map((phase) => at(phase.end)));
  const scale = (fullWidth - LABEL - RIGHT) / total;
  const height = TOP + ROW * phases.length + 22;
  const heading = `${trace.cold_tier ? `Cold start from ${trace.cold_tier}` : "Hot request"}: ${formatMs(trace.ttft_ms)} to the first byte`;
  const spoken = phases.map((phase) => `${phase.name} ${formatMs(phase.ms)}`).join(", ");
  const picture = svg("svg", { viewBox: `0 0 ${fullWidth} ${height}`, role: "img", "aria-label": `${heading}. ${spoken}` });
  const step = [0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000].find((each) => total / each <= (fullWidth < 480 ? 4 : 8)) ?? 10000;
  for (let tick = 0; tick <= total; tick += step) {
    const x = (LABEL + tick * scale).toFixed(1);
    picture.append(svg("line", { class: "rule", x1: x, x2: x, y1: TOP - 4, y2: height - 18 }), svg("text", { class: "soft", x, y: height - 4, "text-anchor": "middle" }, `${tick}`));
  }
  phases.forEach((phase, row) => {
    const start = at(phase.start), took = Math.max(0, at(phase.end) - start);
    const x = LABEL + start * scale, y = TOP + row * ROW, width = Math.max(1.5, took * scale);
    picture.append(svg("text", { x: LABEL - 8, y: y + 13, "text-anchor": "end" }, phase.name),
      svg("rect", { class: AFTER_READY.has(phase.name) ? "after" : "before", x: x.toFixed(1), y, width: width.toFixed(1), height: 15, rx: 3 }),
      svg("text", { class: "soft", x: (x + width + 6).toFixed(1), y: y + 13 }, formatMs(took)));
  });
  return [element("figcaption", {}, heading, element("span", { class: "soft" }, ` · ${trace.model} · ms`)), picture];
}
