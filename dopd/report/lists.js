// Search for a word, the largest gaps of the runs, and which words fall into which regime.
const MAX_LISTED = 60;

// Where the tokens of a completion begin in its text.
function offsets(item) {
  const starts = [];
  let text = "";
  for (const number of item.text) {
    starts.push(text.length);
    text += STRINGS[number];
  }
  return { text, starts };
}

function tokenAt(starts, place) {
  let n = starts.length - 1;
  while (n > 0 && starts[n] > place) n -= 1;
  return n;
}

function matches(item, query) {
  const { text, starts } = offsets(item);
  const lower = text.toLowerCase();
  const found = [];
  for (let place = lower.indexOf(query); place >= 0; place = lower.indexOf(query, place + query.length)) {
    const last = tokenAt(starts, place + query.length - 1);
    for (let n = tokenAt(starts, place); n <= last; n += 1) found.push(n);
  }
  return distinct(found);
}

// Outline what is searched for in the completions that are shown.
function markHits() {
  for (const tokens of document.querySelectorAll("#panes .tokens")) {
    const hits = SCOPE.query ? matches(TRACES[Number(tokens.dataset.item)], SCOPE.query) : [];
    tokens.querySelectorAll(".tok").forEach((node) => node.classList.toggle("hit", hits.includes(Number(node.dataset.n))));
  }
}

function jump(index, n) {
  SCOPE.item = index;
  SCOPE.beside = -1;
  drawScope();
  const tokens = document.querySelector("#panes .tokens");
  const node = tokens.querySelector(`.tok[data-n="${n}"]`);
  byId("microscope").scrollIntoView();
  moveTo(tokens, node);
}

function hit(index, n, value) {
  const item = TRACES[index];
  const part = (from, to) => item.text.slice(Math.max(0, from), to).map((number) => STRINGS[number]).join("");
  const label = item.labels[item.regime[n]];
  const token = el("span", { class: "tok " + label, "--c": regimeColour(label), "--s": strength(item, n).toFixed(3) }, visible(STRINGS[item.text[n]].trim() || STRINGS[item.text[n]]));
  const gap = item.gap[n] === null ? "" : `, q_T ${number(Math.exp(item.teacher[n]))}, q_S ${number(Math.exp(item.student[n]))}`;
  return el("button", { type: "button", onclick: () => jump(index, n) },
    el("span", { class: "number" }, value),
    el("span", { class: "context" }, part(n - 6, n), " ", token, part(n + 1, n + 5)),
    el("small", {}, `${label}${gap}; ${itemName(item)}`));
}

function searchList() {
  const results = el("div", { class: "hits", id: "search-hits" });
  const count = el("p", { class: "note", id: "search-count", "aria-live": "polite" }, "Finds tokens in every traced answer.");
  const input = el("input", { type: "search", id: "search", placeholder: "a word or a part of one", "aria-label": "search for a word" });
  input.addEventListener("input", () => {
    SCOPE.query = input.value.toLowerCase();
    const found = SCOPE.query ? TRACES.flatMap((item, index) => matches(item, SCOPE.query).map((n) => [index, n])) : [];
    count.textContent = SCOPE.query ? `${found.length} token${found.length === 1 ? "" : "s"}${found.length > MAX_LISTED ? `, the first ${MAX_LISTED} are listed` : ""}` : "Finds tokens in every traced answer.";
    results.replaceChildren(...found.slice(0, MAX_LISTED).map(([index, n]) => {
      const item = TRACES[index];
      return hit(index, n, number(item.gap[n] === null ? item.loss[n] : item.gap[n]));
    }));
    markHits();
  });
  return el("div", {}, el("h3", {}, "Search for a word"), el("div", { class: "controls" }, input), count, results);
}

function runChoice(id, indices, redraw) {
  const select = el("select", { id, "aria-label": "run", onchange: () => redraw(indices[select.selectedIndex]) },
    indices.map((run) => el("option", {}, runName(run))));
  return select;
}

function largestGaps(run) {
  const found = TRACES.flatMap((item, index) => (item.run === run ? item.gap.map((gap, n) => [gap, index, n]) : []));
  found.sort((a, b) => b[0] - a[0]);
  return found.slice(0, MAX_LISTED).map(([gap, index, n]) => hit(index, n, number(gap)));
}

// Words of a completion with the label of their token with the largest gap.
function words(item) {
  const found = [];
  item.text.forEach((number, n) => {
    const text = STRINGS[number];
    const before = n ? STRINGS[item.text[n - 1]] : " ";
    if (n === 0 || /^\s/.test(text) || /\s$/.test(before) || /^[^\p{L}\p{N}]/u.test(text)) found.push({ text: "", gap: -1, label: "" });
    const word = found[found.length - 1];
    word.text += text.trim();
    if (item.gap[n] > word.gap) Object.assign(word, { gap: item.gap[n], label: item.labels[item.regime[n]] });
  });
  return found.filter((word) => word.text);
}

function wordTable(run, order) {
  const counts = new Map();
  for (const item of TRACES.filter((trace) => trace.run === run)) {
    for (const word of words(item)) {
      const entry = counts.get(word.text) || { text: word.text, total: 0, HT: 0, HS: 0, LH: 0, LL: 0 };
      entry.total += 1;
      entry[word.label] += 1;
      counts.set(word.text, entry);
    }
  }
  const labels = ["HT", "HS", "LH", "LL"];
  const rows = [...counts.values()].sort((a, b) => b[order] - a[order] || b.total - a.total || (a.text < b.text ? -1 : 1));
  return table(`words by regime, ${runName(run)}`, ["word", "all", ...labels, ""], rows.slice(0, MAX_LISTED).map((entry) => {
    const mix = el("div", { class: "mix", "aria-hidden": "true" }, labels.map((label) => {
      const piece = el("i");
      Object.assign(piece.style, { width: (100 * entry[label]) / entry.total + "%", background: regimeColour(label) });
      return piece;
    }));
    return el("tr", { "data-word": entry.text }, el("td", { "data-text": entry.text }, el("code", {}, visible(entry.text))), el("td", {}, String(entry.total)),
      labels.map((label) => el("td", {}, String(entry[label]))), el("td", {}, mix));
  }));
}

function drawLists() {
  const body = show("lists");
  body.append(searchList());
  const routed = distinct(TRACES.filter((item) => item.thresholds).map((item) => item.run));
  if (!routed.length) return;
  const gaps = el("div", { class: "hits", id: "largest-gaps" }, largestGaps(routed[0]));
  const pickGaps = runChoice("gaps-run", routed, (run) => gaps.replaceChildren(...largestGaps(run)));
  body.append(el("div", {}, el("h3", {}, "Tokens with the largest gaps"), el("div", { class: "controls" }, pickGaps),
    el("p", { class: "note" }, "Gap in nats between teacher and student, both with p."), gaps));
  const state = { run: routed[0], order: "total" };
  const holder = el("div", { class: "words", id: "words" });
  const redraw = () => holder.replaceChildren(wordTable(state.run, state.order));
  const orders = ["total", "HT", "HS", "LH", "LL"];
  const pickOrder = el("select", { id: "words-order", "aria-label": "sort by", onchange: () => { state.order = orders[pickOrder.selectedIndex]; redraw(); } },
    orders.map((name) => el("option", {}, name === "total" ? "most frequent" : `most in ${name}`)));
  body.append(el("div", {}, el("h3", {}, "Words by regime"),
    el("div", { class: "controls" }, runChoice("words-run", routed, (run) => { state.run = run; redraw(); }), pickOrder),
    el("p", { class: "note" }, "A word counts for the regime of its token with the largest gap."), holder));
  redraw();
}

// The first completion to look at: of the last step of the first routed run, the one with the most tokens of large gap.
function opening() {
  const run = (TRACES.find((item) => item.thresholds) || TRACES[0]).run;
  const step = Math.max(...TRACES.filter((item) => item.run === run).map((item) => item.step));
  const large = (item) => item.gap.filter((gap) => item.thresholds && gap >= item.thresholds.gap).length;
  return where({ run, step }).reduce((best, n) => (large(TRACES[n]) > large(TRACES[best]) ? n : best));
}

if (TRACES.length) {
  byId("microscope").hidden = false;
  drawLegend();
  drawLists();
  SCOPE.item = opening();
  drawScope();
}
