// Numbers and words for people, and elements without innerHTML: nothing that a server says is ever parsed as markup.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function formatBytes(count) {
  if (!count) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (count >= 1024 && power < units.length - 1) { count /= 1024; power += 1; }
  return `${count >= 100 || power === 0 ? Math.round(count) : count.toFixed(1)} ${units[power]}`;
}

export function formatMs(ms) {
  if (!ms) return "–";
  return ms >= 1000 ? `${(ms / 1000).toFixed(2)} s` : `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

export function formatSeconds(seconds) {
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

export function formatClock(atS) {
  return new Date(atS * 1000).toLocaleTimeString([], { hour12: false });
}

/** A table in a box that scrolls by itself. `columns`: {title, number, roomy: left out of narrow windows}; `rows`: arrays of text or elements. */
export function table(caption, columns, rows) {
  const cell = (tag, column, content) => element(tag, { class: [column.number && "number", column.roomy && "roomy"].filter(Boolean).join(" ") || undefined, scope: tag === "th" ? "col" : undefined }, content);
  const head = element("tr", {}, ...columns.map((column) => cell("th", column, column.title)));
  const body = rows.map((row) => element("tr", {}, ...row.map((content, index) => cell("td", columns[index], content))));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {}, element("caption", {}, caption), element("thead", {}, head), element("tbody", {}, ...body)));
}

export function empty(text) {
  return element("p", { class: "empty" }, text);
}
