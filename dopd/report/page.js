// Helpers and theme. Everything a model wrote is inserted as text, never as HTML.
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

function regimeColour(label) {
  return DATA.regime_colours[label];
}

function runName(index) {
  const run = DATA.runs[index];
  return run.several ? `${run.label}, seed ${run.seed}` : run.label;
}

// A text whose parts between backquotes are settings or commands.
function marked(text) {
  return text.split("`").map((part, n) => (n % 2 ? el("code", {}, part) : part));
}

function swatch(colour) {
  const node = el("span", { class: "swatch", "aria-hidden": "true" });
  node.style.background = colour;
  return node;
}

// A table with its downloads; on a small screen each row stacks as a block, where `data-label` names every cell.
function table(name, columns, rows) {
  for (const row of rows) {
    row.setAttribute("role", "row");
    [...row.children].forEach((cell, n) => {
      cell.setAttribute("role", n ? "cell" : "rowheader");
      if (n) cell.dataset.label = columns[n];
    });
  }
  const node = el("table", { role: "table", "aria-label": name },
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, columns.map((column) => el("th", { scope: "col", role: "columnheader" }, column)))),
    el("tbody", { role: "rowgroup" }, rows));
  return el("div", { class: "sheet" }, node, downloads(name, { CSV: () => tableCsv(node), LaTeX: () => tableLatex(node, name) }));
}

function toggleTheme() {
  const root = document.documentElement;
  const dark = getComputedStyle(root).colorScheme.includes("dark");
  root.dataset.theme = dark ? "light" : "dark";
}

byId("title").textContent = DATA.title;
byId("subtitle").textContent = DATA.subtitle;
byId("theme").addEventListener("click", toggleTheme);
