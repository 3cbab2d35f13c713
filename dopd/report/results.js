// What comes first: the verdict, warnings by method, results, differences, and settings.
const SIGNS = { better: "\u2191", worse: "\u2193", undecided: "\u2248", untested: "?", unknown: "?" };

function drawVerdict() {
  if (!DATA.verdict) return;
  const { level, sentence, next } = DATA.verdict;
  byId("verdict").classList.add(level);
  show("verdict").append(
    el("p", { class: "sentence" }, el("span", { class: "sign", "aria-hidden": "true" }, SIGNS[level]), el("span", {}, sentence)),
    el("h3", {}, "What next"), el("ul", { class: "next" }, next.map((step) => el("li", {}, marked(step)))));
}

function warningNode(warning) {
  const [first, ...others] = warning.runs;
  const name = (run) => (run.run && warning.of > 1 ? `${run.run}: ` : "");
  const count = warning.of > 1 ? `${warning.runs.length} of ${warning.of} runs` : null;
  return el("div", { class: "finding" + (warning.level === "bad" ? "" : " note-level") },
    el("div", {}, el("b", {}, warning.title), count ? el("span", { class: "who" }, ` ${count}`) : null),
    el("div", {}, name(first) + first.text),
    others.length ? el("details", {}, el("summary", {}, `the other ${others.length === 1 ? "run" : `${others.length} runs`}`),
      others.map((run) => el("div", {}, name(run) + run.text))) : null,
    el("div", { class: "advice" }, el("b", {}, "To do: "), marked(warning.advice)));
}

function drawFindings() {
  if (!DATA.findings.length) return;
  const body = show("findings");
  for (const { method, warnings } of DATA.findings) {
    body.append(el("div", { class: "warned" },
      el("h3", {}, method, el("span", { class: "count" }, ` ${warnings.length} warning${warnings.length === 1 ? "" : "s"}`)),
      warnings.map(warningNode)));
  }
}

// A number with its interval; `from` and `to` are the ends of the scale on which it is drawn.
function intervalCell(cell, colour, from, to, zero) {
  const node = el("td", { "data-mean": cell.mean, "data-low": cell.low, "data-high": cell.high }, el("span", {}, cell.text));
  if (cell.mean === undefined) return node;
  const place = (value) => (100 * (value - from)) / (to - from);
  const bar = el("div", { class: "interval", "aria-hidden": "true" });
  if (zero) bar.append(el("s", { style: `left:${place(0)}%` }));
  if (cell.low !== undefined) {
    const range = el("i");
    Object.assign(range.style, { left: place(cell.low) + "%", width: place(cell.high) - place(cell.low) + "%", background: colour });
    bar.append(range);
  }
  const mark = el("b");
  Object.assign(mark.style, { left: place(cell.mean) + "%", background: colour });
  bar.append(mark);
  node.append(bar);
  return node;
}

function drawHeadline() {
  const { columns, rows } = DATA.headline;
  if (!rows.length) return;
  const body = rows.map((row) => {
    const colour = row.colour < 0 ? "var(--soft)" : row.hue;
    return el("tr", {},
      el("th", { scope: "row" }, row.kind === "method" ? lineSample(row.hue, row.colour) : null, row.label),
      row.cells.map((cell) => intervalCell(cell, colour, 0, 1, false)));
  });
  show("headline").append(table("results", ["", ...columns], body));
}

function drawComparisons() {
  const { table: made, note } = DATA.verdict || {};
  if (!made || !made.rows.length) return;
  const ends = made.rows.flatMap((row) => row.cells.flatMap((cell) => [cell.mean, cell.low, cell.high])).filter((value) => value !== undefined);
  const most = Math.max(1, ...ends.map(Math.abs));
  const body = made.rows.map((row) => el("tr", {}, el("th", { scope: "row" }, row.label), row.cells.map((cell) => {
    if (cell.mean !== undefined) return intervalCell(cell, "var(--ink)", -most, most, true);
    return el("td", { class: cell.verdict ? "says " + cell.verdict : null }, cell.text);
  })));
  show("comparisons").append(table("differences", ["", ...made.columns], body), el("p", { class: "note" }, note));
}

function drawDifferences() {
  const { columns, rows } = DATA.differences;
  if (!rows.length) return;
  const body = rows.map(([key, cells]) =>
    el("tr", {}, el("th", { scope: "row" }, key), cells.map((cell) => el("td", {}, cell))));
  show("differences").append(table("settings", ["", ...columns], body));
}

drawVerdict();
drawFindings();
drawHeadline();
drawComparisons();
drawDifferences();
