// Helpers, theme, and the sections that are tables. Everything a model wrote is inserted as text, never as HTML.
const DATA = JSON.parse(document.getElementById("data").textContent);
const TRACES = DATA.traces.items;
const STRINGS = DATA.traces.strings;

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") node.className = value;
    else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat()) {
    if (child !== null && child !== undefined) node.append(child);
  }
  return node;
}

function byId(id) {
  return document.getElementById(id);
}

function show(section) {
  byId(section).hidden = false;
  return byId(section).querySelector(".body");
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "-";
  if (value !== 0 && Math.abs(value) < 0.5 * 10 ** -digits) return value.toExponential(1);
  return value.toFixed(digits);
}

function percent(value) {
  return (100 * value).toFixed(Math.abs(value) < 0.1 ? 1 : 0) + "%";
}

// What cannot be seen in a text, made visible.
function visible(text) {
  const shown = text.replace(/\n/g, "\u21b5").replace(/\t/g, "\u21e5");
  return shown.trim() === "" ? shown.replace(/ /g, "\u2423") || "(empty)" : shown;
}

function methodColour(index) {
  if (index < 0) return "var(--soft)";
  const colour = DATA.method_colours[index % DATA.method_colours.length];
  return colour === "#000000" ? "var(--method-last)" : colour;
}

function regimeColour(label) {
  return DATA.regime_colours[label];
}

function runName(index) {
  const run = DATA.runs[index];
  return run.several ? `${run.label}, seed ${run.seed}` : run.label;
}

function swatch(colour) {
  const node = el("span", { class: "swatch", "aria-hidden": "true" });
  node.style.background = colour;
  return node;
}

function table(columns, rows) {
  return el("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "table" },
    el("table", {},
      el("thead", {}, el("tr", {}, columns.map((name) => el("th", { scope: "col" }, name)))),
      el("tbody", {}, rows)));
}

function toggleTheme() {
  const root = document.documentElement;
  const dark = getComputedStyle(root).colorScheme.includes("dark");
  root.dataset.theme = dark ? "light" : "dark";
}

function drawFindings() {
  if (!DATA.findings.length) return;
  const body = show("findings");
  for (const finding of DATA.findings) {
    body.append(el("div", { class: "finding" + (finding.level === "bad" ? "" : " note-level") },
      el("b", {}, finding.title), " ", el("span", { class: "who" }, finding.run), el("div", {}, finding.text)));
  }
}

function headlineCell(cell, colour) {
  const node = el("td", {}, cell.text);
  if (cell.mean === undefined) return node;
  const bar = el("div", { class: "interval", "aria-hidden": "true" });
  if (cell.low !== undefined) {
    const range = el("i");
    Object.assign(range.style, { left: 100 * cell.low + "%", width: 100 * (cell.high - cell.low) + "%", background: colour });
    bar.append(range);
  }
  const mark = el("b");
  Object.assign(mark.style, { left: 100 * cell.mean + "%", background: colour });
  bar.append(mark);
  node.append(bar);
  return node;
}

function drawHeadline() {
  const { columns, rows } = DATA.headline;
  if (!rows.length) return;
  const body = rows.map((row) => {
    const colour = methodColour(row.colour);
    return el("tr", {},
      el("th", { scope: "row" }, row.kind === "method" ? swatch(colour) : null, row.label),
      row.cells.map((cell) => headlineCell(cell, colour)));
  });
  show("headline").append(table(["", ...columns], body));
}

function drawDifferences() {
  const { columns, rows } = DATA.differences;
  if (!rows.length) return;
  const body = rows.map(([key, cells]) =>
    el("tr", {}, el("th", { scope: "row" }, key), cells.map((cell) => el("td", {}, cell))));
  show("differences").append(table(["", ...columns], body));
}

byId("title").textContent = DATA.title;
byId("subtitle").textContent = DATA.subtitle;
byId("theme").addEventListener("click", toggleTheme);
drawFindings();
drawHeadline();
drawDifferences();
