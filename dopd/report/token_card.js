// The card of one token: what teacher and student say of it, and how it is taught.
const CARD = byId("card");
let openToken = null;

function bar(share, colour, mark) {
  const fill = el("i");
  fill.style.width = 100 * Math.min(1, share) + "%";
  if (colour) fill.style.background = colour;
  const node = el("span", { class: "track", "aria-hidden": "true" }, fill);
  if (mark !== undefined) {
    const line = el("b");
    line.style.left = `calc(${100 * Math.min(1, mark)}% - 1px)`;
    node.append(line);
  }
  return node;
}

function topBars(title, flat, drawn, colour, field) {
  const rows = [];
  for (let n = 0; n < (flat || []).length; n += 2) {
    const text = STRINGS[flat[n]];
    rows.push(el("code", { class: text === drawn ? "drawn" : null, title: text }, visible(text.trim() || text)),
      bar(flat[n + 1], colour), el("span", {}, number(flat[n + 1])));
  }
  return el("div", { "data-field": field }, el("h4", {}, title),
    rows.length ? el("div", { class: "bars" }, rows) : el("span", {}, "not pulled: weight 0"));
}

function fact(label, field, text) {
  return el("div", {}, el("span", {}, label), el("b", { "data-field": field }, text));
}

const SOURCE_NAMES = {
  teacher: "target: plain teacher", privileged_teacher: "target: teacher with p", privileged_student: "target: student with p",
};

function cardContent(item, n) {
  const label = item.labels[item.regime[n]];
  const rule = item.rules[label];
  const probability = (logprob) => (logprob === null ? null : Math.exp(logprob));
  const rows = [];
  const teacherName = item.view === "plain" ? "teacher, plain" : "q_T teacher with p";
  for (const [name, field, logprob, colour] of [
    [teacherName, "q_T", item.teacher[n], regimeColour("HT")],
    ["q_S student with p", "q_S", item.student[n], regimeColour("HS")],
    ["student, plain", "q_plain", item.plain[n], regimeColour("all")],
  ]) {
    const value = probability(logprob);
    if (value === null) continue;
    rows.push(el("span", {}, name), bar(value, colour), el("b", { "data-field": field }, number(value)));
  }
  if (item.gap[n] !== null && item.thresholds !== null) {
    const whole = Math.max(item.gap[n], 2 * item.thresholds.gap) || 1;
    rows.push(el("span", {}, "gap | threshold"), bar(item.gap[n] / whole, regimeColour(label), item.thresholds.gap / whole),
      el("span", {}, el("b", { "data-field": "gap" }, number(item.gap[n])), " | ",
        el("span", { "data-field": "threshold" }, number(item.thresholds.gap))));
  }
  const drawn = STRINGS[item.text[n]];
  const meaning = DATA.regimes[label];
  return [
    el("div", { class: "top" },
      el("code", { "data-field": "text" }, visible(drawn.trim() || drawn)),
      el("span", { class: "tok " + label, "--c": regimeColour(label), "--s": 1 }, label === "all" ? "not routed" : label),
      el("button", { type: "button", class: "close", "aria-label": "close", onclick: closeCard }, "\u00d7")),
    el("p", { class: "why" }, `${meaning.name}: ${meaning.meaning}`),
    el("div", { class: "bars" }, rows),
    el("div", { class: "facts-grid" },
      fact("weight", "weight", number(item.weight[n], 2)),
      fact("loss (nats)", "loss", number(item.loss[n])),
      fact("entropy (nats)", "entropy", number(item.entropy[n])),
      fact("divergence", "divergence", rule.divergence.replace("_", " ")),
      fact("over", "support", rule.support.replace("_", " ")),
      fact("place", "place", `${n + 1} of ${item.num}`)),
    el("div", { class: "tops" },
      topBars(SOURCE_NAMES[rule.source], item.target_top[n], drawn,
        regimeColour(rule.source === "privileged_student" ? "HS" : "HT"), "top_target"),
      topBars("student, plain", item.student_top[n], drawn, regimeColour("all"), "top_student")),
  ];
}

function openCard(node, item, n, spoken) {
  if (openToken === node && !CARD.hidden) return;
  if (openToken) openToken.classList.remove("open");
  openToken = node;
  node.classList.add("open");
  CARD.replaceChildren(...cardContent(item, n));
  CARD.hidden = false;
  placeCard(node);
  if (spoken) {
    const gap = item.gap[n] === null ? "" : `, gap ${number(item.gap[n])}`;
    byId("spoken").textContent = `${visible(STRINGS[item.text[n]])}: ${item.labels[item.regime[n]]}${gap}, loss ${number(item.loss[n])}`;
  }
}

function placeCard(node) {
  const box = node.getClientRects()[0];
  if (getComputedStyle(CARD).position === "fixed") {  // a sheet at the bottom of a small screen: keep the token above it
    const hidden = box.bottom + 14 - CARD.getBoundingClientRect().top;
    if (hidden > 0) window.scrollBy(0, hidden);
    return;
  }
  const { offsetWidth: width, offsetHeight: height } = CARD;
  const room = document.documentElement.clientWidth;
  const left = Math.max(8, Math.min(room - width - 8, box.left + box.width / 2 - width / 2));
  const under = box.bottom + 10 + height < window.innerHeight || box.top < height + 20;
  CARD.style.left = left + window.scrollX + "px";
  CARD.style.top = (under ? box.bottom + 8 : box.top - height - 8) + window.scrollY + "px";
}

function closeCard() {
  CARD.hidden = true;
  if (openToken) openToken.classList.remove("open");
  openToken = null;
}

document.addEventListener("pointerdown", (event) => {
  if (!CARD.contains(event.target) && !event.target.closest(".tokens .tok")) closeCard();
});
