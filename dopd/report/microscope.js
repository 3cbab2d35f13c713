// The token microscope: pick a run, step, example and rollout; look at its tokens, alone or beside another's.
const SCOPE = { item: 0, beside: -1, query: "" };

function itemName(item) {
  const score = item.score === null ? "" : `, score ${number(item.score, item.score % 1 ? 2 : 0)}`;
  const step = item.kind === "inspect" ? "" : `, step ${item.step}`;
  return `${runName(item.run)}${step}, rollout ${item.rollout + 1}${score}`;
}

function distinct(values) {
  return [...new Set(values)];
}

function where(conditions) {
  return TRACES.map((_, n) => n).filter((n) => Object.entries(conditions).every(([name, value]) => TRACES[n][name] === value));
}

// The trace closest to what is asked for: run first, then step, then prompt, then rollout.
function nearest(wanted) {
  let candidates = TRACES.map((_, n) => n);
  for (const name of ["run", "step", "key", "rollout"]) {
    const kept = candidates.filter((n) => TRACES[n][name] === wanted[name]);
    if (kept.length) candidates = kept;
  }
  return candidates[0];
}

function choose(wanted) {
  const before = SCOPE.beside >= 0 ? TRACES[SCOPE.beside] : null;
  SCOPE.item = nearest({ ...TRACES[SCOPE.item], ...wanted });
  if (before) {
    const item = TRACES[SCOPE.item];
    const same = where({ key: item.key }).filter((n) => n !== SCOPE.item);
    const kept = same.filter((n) => TRACES[n].run === before.run);
    SCOPE.beside = kept.find((n) => TRACES[n].step === before.step && TRACES[n].rollout === before.rollout) ?? kept[0] ?? same[0] ?? -1;
  }
  drawScope();
}

function picker(id, label, values, current, nameOf, choosing, kind) {
  const select = el("select", { id: "pick-" + id, onchange: () => choosing(values[select.selectedIndex]) },
    values.map((value) => el("option", { selected: value === current }, nameOf(value))));
  if (values.length < 2 && ["run", "step"].includes(id)) return null;  // nothing to pick
  const place = values.indexOf(current);
  const go = (move, text, title) => el("button", {
    type: "button", title, "aria-label": title, disabled: place + move < 0 || place + move >= values.length,
    onclick: () => choosing(values[place + move]),
  }, text);
  const inner = kind === "half steps"
    ? el("span", { class: "with-steps" }, go(-1, "\u2039", "earlier"), select, go(1, "\u203a", "later")) : select;
  return el("label", { class: kind || null }, label, inner);
}

function drawPickers() {
  const item = TRACES[SCOPE.item];
  const at = { run: item.run, step: item.step };
  const keys = distinct(where(at).map((n) => TRACES[n].key));
  const rollouts = where({ ...at, key: item.key });
  const others = where({ key: item.key }).filter((n) => n !== SCOPE.item);
  const promptOf = (key) => {
    const trace = TRACES[where({ ...at, key })[0]];
    const fixed = trace.kind === "probe" ? " (same at every step)" : "";
    return `${keys.indexOf(key) + 1}${fixed}: ${visible(trace.prompt).slice(0, 44)}`;
  };
  const pickers = [
    picker("run", "run", distinct(TRACES.map((trace) => trace.run)), item.run, runName, (run) => choose({ run }), "half"),
    picker("step", "step", distinct(where({ run: item.run }).map((n) => TRACES[n].step)).sort((a, b) => a - b), item.step,
      String, (step) => choose({ step }), "half steps"),
    picker("example", `example (of ${keys.length})`, keys, item.key, promptOf, (key) => choose({ key, rollout: 0 }), "wide"),
    picker("rollout", `rollout (of ${rollouts.length})`, rollouts, SCOPE.item,
      (n) => `${TRACES[n].rollout + 1}${TRACES[n].score === null ? "" : ", score " + number(TRACES[n].score, 0)}`,
      (n) => choose({ rollout: TRACES[n].rollout })),
    picker("beside", others.length ? `beside it: the same prompt (${others.length} more)` : "beside it: no other answer was traced",
      [-1, ...others], SCOPE.beside, (n) => (n < 0 ? "nothing" : itemName(TRACES[n])),
      (n) => { SCOPE.beside = n; drawScope(); }, "wide"),
  ];
  byId("pickers").replaceChildren(...pickers.filter((node) => node));
}

// How strong a token's colour is: half at the threshold, more above it. Without a gap, by its loss.
function strength(item, n) {
  if (item.gap[n] !== null) return item.gap[n] / (item.gap[n] + item.thresholds.gap || 1);
  const mean = item.loss.reduce((sum, loss) => sum + loss, 0) / item.loss.length;
  return item.loss[n] / (item.loss[n] + mean || 1);
}

function tokenNode(item, n) {
  const label = item.labels[item.regime[n]];
  const text = STRINGS[item.text[n]];
  const shown = text.trim() === "" ? visible(text) + (text.includes("\n") ? "\n" : "") : text.replace(/\n/g, "\u21b5\n");
  const lead = shown.match(/^ */)[0];  // a space before a word stays outside the colour
  const node = el("span", {
    class: "tok " + label, role: "button", tabindex: n ? "-1" : "0", "data-n": n, "--c": regimeColour(label), "--s": strength(item, n).toFixed(3),
    "aria-label": `${visible(text)}, ${label}`, "aria-describedby": "card",
  }, shown.slice(lead.length) || shown);
  return shown.length > lead.length && lead ? [lead, node] : [node];
}

function pane(index, name) {
  const item = TRACES[index];
  const nodes = item.text.map((_, n) => tokenNode(item, n)).flat();
  const tokens = el("div", { class: "tokens", role: "group", "aria-label": `tokens of ${itemName(item)}`, "data-item": index }, nodes);
  const find = (event) => event.target.closest && event.target.closest(".tok");
  const open = (event, spoken) => {
    const node = find(event);
    if (node) openCard(node, item, Number(node.dataset.n), spoken);
  };
  tokens.addEventListener("pointerover", (event) => { if (event.pointerType === "mouse") open(event, false); });
  tokens.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse" && !tokens.contains(document.activeElement)) closeCard(); });
  tokens.addEventListener("click", (event) => { const node = find(event); if (node) { moveTo(tokens, node); open(event, false); } });
  tokens.addEventListener("focusin", (event) => open(event, true));
  tokens.addEventListener("keydown", (event) => tokenKeys(event, tokens));
  const cut = item.num > item.text.length ? ` (the first ${item.text.length} are shown)` : "";
  const thresholds = item.thresholds ? `, gap threshold ${number(item.thresholds.gap)}, confidence threshold ${number(item.thresholds.confidence)}` : "";
  return el("div", { class: "pane", "data-pane": name },
    el("p", { class: "facts" }, el("b", {}, itemName(item)), ` \u2013 ${item.num} tokens${cut}${thresholds}`),
    pictures(item),
    el("dl", {}, el("dt", {}, "prompt"), el("dd", { "data-field": "prompt", tabindex: "0" }, item.prompt),
      item.p === null ? null : el("dt", {}, "privileged information p (the trained student does not see it)"),
      item.p === null ? null : el("dd", { "data-field": "p", tabindex: "0" }, item.p)),
    tokens, figureDownloads(`tokens of ${itemName(item)}`, () => stripSvg(item)));
}

// The whole label, above its box or under it, where no other label (`taken`) is: of a box on the left it goes on to the right, and the
// other way. Places are shares of the picture, and letters are as wide as on the smallest.
const LETTER = 7 / 260;
const LINE = 18 / 260;

function boxLabel(label, [left, top, right, bottom], taken) {
  const rightwards = left + right < 1;
  const room = rightwards ? 1 - left : right;
  const width = Math.min(room, LETTER * (label.length + 1));
  const height = LINE * Math.ceil((LETTER * label.length) / room);
  const from = rightwards ? left : right - width;
  const places = [[top - height, top], [bottom, bottom + height]];
  const isFree = ([start, end]) => start > -LINE - 0.01 && end < 1 + LINE
    && !taken.some((one) => one.from < from + width && from < one.to && one.start < end && start < one.end);
  const [start, end] = places.find(isFree) || places[0];
  taken.push({ from, to: from + width, start, end });
  const across = rightwards ? { left: 100 * left + "%" } : { right: 100 * (1 - right) + "%" };
  const node = el("span", { class: "label" }, label);
  Object.assign(node.style, across, { maxWidth: 100 * room + "%" },
    start === bottom ? { top: `calc(${100 * bottom}% + 2px)` } : { bottom: `calc(${100 * (1 - top)}% + 2px)` });
  return node;
}

function pictures(item) {
  return (item.images || []).map((source, index) => {
    if (!source) return el("p", { class: "note" }, "A picture that could not be read, or for which the page had no room.");
    const taken = [];
    const frame = el("div", { class: "picture" }, el("img", { src: source, alt: `picture ${index + 1} of the prompt` }));
    for (const box of item.boxes.filter((other) => (other.image || 0) === index)) {
      const [left, top, right, bottom] = box.xyxy;
      const node = el("div", { class: "box" });
      Object.assign(node.style, {
        left: 100 * left + "%", top: 100 * top + "%", width: 100 * (right - left) + "%", height: 100 * (bottom - top) + "%",
      });
      frame.append(node);
      if (box.label) frame.append(boxLabel(String(box.label), box.xyxy, taken));
    }
    return frame;
  });
}

function moveTo(tokens, node) {
  tokens.querySelectorAll('.tok[tabindex="0"]').forEach((old) => old.setAttribute("tabindex", "-1"));
  node.setAttribute("tabindex", "0");
  node.focus({ preventScroll: false });
}

function tokenKeys(event, tokens) {
  const all = [...tokens.querySelectorAll(".tok")];
  const place = all.indexOf(document.activeElement);
  const beside = { ArrowLeft: place - 1, ArrowRight: place + 1, Home: 0, End: all.length - 1 }[event.key];
  let next = beside === undefined ? null : all[beside];
  if (event.key === "ArrowUp" || event.key === "ArrowDown") next = inLine(all, all[place], event.key === "ArrowDown" ? 1 : -1);
  if (event.key === "Escape") closeCard();
  if (next === null) return;
  event.preventDefault();
  event.stopPropagation();
  if (next) moveTo(tokens, next);
}

// The token above or below: the nearest one of the next line.
function inLine(all, from, way) {
  const box = from.getBoundingClientRect();
  const away = all.map((node) => [node, node.getBoundingClientRect()]).filter(([, other]) => way * (other.top - box.top) > box.height / 2);
  if (!away.length) return undefined;
  const line = away.reduce((best, [, other]) => (way * other.top < way * best ? other.top : best), away[0][1].top);
  const inIt = away.filter(([, other]) => Math.abs(other.top - line) < box.height / 2);
  return inIt.sort((a, b) => Math.abs(a[1].left - box.left) - Math.abs(b[1].left - box.left))[0][0];
}

function drawScope() {
  closeCard();
  drawPickers();
  const panes = [pane(SCOPE.item, "first")];
  if (SCOPE.beside >= 0) panes.push(pane(SCOPE.beside, "second"));
  byId("panes").className = panes.length > 1 ? "two" : "";
  byId("panes").replaceChildren(...panes);
  markHits();
}

function drawLegend() {
  const used = distinct(TRACES.flatMap((item) => item.labels));
  const labels = Object.keys(DATA.regimes).filter((label) => used.includes(label));
  byId("legend").replaceChildren(...labels.map((label) => el("li", {},
    el("span", { class: "tok " + label, "--c": regimeColour(label) }, label),
    el("span", {}, DATA.regimes[label].name, el("small", {}, DATA.regimes[label].meaning)))));
  byId("keys").textContent = "Keys: arrows, Home and End move between tokens; [ and ] change the step, j and k the example, " +
    "r the rollout, c what stands beside it; / searches; t changes light and dark; Escape closes the card." +
    (DATA.traces.left_out ? ` ${DATA.traces.left_out} traced completions had no room in this page.` : "");
}

function cycle(id, move) {
  const select = byId("pick-" + id);
  if (!select || select.length < 2) return;
  const next = (select.selectedIndex + move + select.length) % select.length;
  select.selectedIndex = next;
  select.dispatchEvent(new Event("change"));
}

document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") closeCard();
  if (event.key === "t") toggleTheme();
  if (!TRACES.length) return;
  const keys = { "[": ["step", -1], "]": ["step", 1], j: ["example", 1], k: ["example", -1], r: ["rollout", 1], c: ["beside", 1] };
  if (keys[event.key]) cycle(...keys[event.key]);
  if (event.key === "/") {
    event.preventDefault();
    byId("search").focus();
  }
});
