// The tokens of one answer as a drawing that stands alone, for a paper or a slide.
const STRIP = { width: 900, side: 12, line: 38, size: 16, font: "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace" };
const UNDERLINES = { HT: [["", 0], ["", 3.2]], HS: [["6 3", 0]], LL: [["1.5 3", 0]] };  // dashes and distance of each line

function stripSvg(item) {
  const pen = el("canvas").getContext("2d");
  pen.font = `${STRIP.size}px ${STRIP.font}`;
  const parts = [];
  let [x, y] = [STRIP.side, 26];
  const used = new Set();
  item.text.forEach((place, n) => {
    const text = STRINGS[place];
    const shown = visible(text.trim() || text);
    const [lead, width] = [/^ /.test(text) ? 8 : 2, pen.measureText(shown).width + 4];
    if (x > STRIP.side && x + lead + width > STRIP.width - STRIP.side) [x, y] = [STRIP.side, y + STRIP.line];
    else if (x > STRIP.side) x += lead;
    const label = item.labels[item.regime[n]];
    used.add(label);
    parts.push(...stripToken(shown, label, x, y, width, strength(item, n)));
    x += width;
    if (text.includes("\n")) [x, y] = [STRIP.side, y + STRIP.line];
  });
  const height = y + 22;
  const node = svg("svg", { class: "strip", viewBox: `0 0 ${STRIP.width} ${height}`, width: STRIP.width, height }, parts);
  document.body.append(node);  // styles are computed of what is on the page
  const legend = [...used].map((label) => ({ label: `${label}: ${DATA.regimes[label].name}`, hue: regimeColour(label), place: null }));
  const made = standalone(node, itemName(item), legend);
  node.remove();
  return made;
}

function stripToken(text, label, x, y, width, strong) {
  const hue = regimeColour(label);
  const lines = (UNDERLINES[label] || [["", 0]]).map(([dashes, down]) => svg("line", {
    x1: x, x2: x + width, y1: y + 7 + down, y2: y + 7 + down, style: `stroke:${hue}`, "stroke-width": label === "HT" ? 1.4 : 2.6, "stroke-dasharray": dashes || null,
  }));
  return [
    svg("rect", { x, y: y - 16, width, height: 22, rx: 3, style: `fill:${hue}`, "fill-opacity": (DATA.tint * strong).toFixed(3) }),
    ...lines,
    svg("text", { x: x + 2, y, style: `fill:var(--ink);font:${STRIP.size}px ${STRIP.font}`, "xml:space": "preserve" }, text),
  ];
}
