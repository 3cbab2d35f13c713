// Curves as SVG: lines with the seeds behind their mean, stacked shares, and a histogram over time.
const CHART = { width: 460, height: 250, left: 48, right: 8, top: 10, bottom: 28 };
const DASHES = ["", "7 3", "2 3"];

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function niceTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= 0.8 * rough);
  const ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + 1e-9 * step; tick += step) ticks.push(tick);
  return ticks.map((tick) => Number(tick.toPrecision(10)));
}

function scaleOf(low, high, from, to) {
  return (value) => from + ((value - low) / (high - low || 1)) * (to - from);
}

function tickText(value, unit) {
  return unit === "share" ? Math.round(100 * value) + "%" : String(value);
}

function frame(chart, low, high, first, last) {
  const x = scaleOf(first, last, CHART.left, CHART.width - CHART.right);
  const y = scaleOf(low, high, CHART.height - CHART.bottom, CHART.top);
  const node = svg("svg", {
    viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img", tabindex: "0",
    "aria-label": `${chart.title}; left and right arrow keys read values`,
  });
  for (const tick of niceTicks(low, high, 4)) {
    node.append(svg("line", { class: "grid", x1: CHART.left, x2: CHART.width - CHART.right, y1: y(tick), y2: y(tick) }));
    node.append(svg("text", { x: CHART.left - 6, y: y(tick) + 4, "text-anchor": "end" }, tickText(tick, chart.unit)));
  }
  for (const tick of niceTicks(first, last, 5)) {
    if (!Number.isInteger(tick)) continue;
    node.append(svg("text", { x: x(tick), y: CHART.height - 8, "text-anchor": "middle" }, String(tick)));
  }
  return { node, x, y };
}

function pathOf(xs, ys, x, y) {
  return xs.map((value, n) => `${n ? "L" : "M"}${x(value).toFixed(1)},${y(ys[n]).toFixed(1)}`).join("");
}

function lineChart(chart) {
  const all = chart.series.flatMap((series) => [series, ...series.seeds]);
  const values = all.flatMap((series) => series.y);
  const steps = all.flatMap((series) => series.x);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (chart.unit === "share") {
    [low, high] = [0, 1];
  } else {
    low = low >= 0 && low < 0.6 * high ? 0 : low;
    const room = 0.06 * (high - low) || Math.abs(high) * 0.1 || 1;
    high += room;
    low = low === 0 ? 0 : low - room;
  }
  const { node, x, y } = frame(chart, low, high, Math.min(...steps), Math.max(...steps));
  for (const series of chart.series) {
    const colour = series.colour === "#000000" ? "var(--method-last)" : series.colour;
    const line = (points, width, opacity) => svg("path", {
      d: pathOf(points.x, points.y, x, y), fill: "none", style: `stroke:${colour}`, "stroke-width": width, opacity,
      "stroke-dasharray": width > 1 ? DASHES[series.dash % DASHES.length] : "", "stroke-linejoin": "round",
    });
    for (const seed of series.seeds) node.append(line(seed, 1, 0.4));
    node.append(line(series, 2.6, 1));
    if (series.x.length < 16) {
      series.x.forEach((step, n) => node.append(
        svg("circle", { cx: x(step), cy: y(series.y[n]), r: 3.4, style: `fill:${colour}` })));
    }
  }
  const ticks = [...new Set(chart.series.flatMap((series) => series.x))].sort((a, b) => a - b);
  return withReader(chart, node, x, ticks, (step) => chart.series.map((series) => {
    const place = series.x.indexOf(step);
    const colour = series.colour === "#000000" ? "var(--method-last)" : series.colour;
    return [colour, series.label, place < 0 ? null : series.y[place]];
  }));
}

function stackChart(chart) {
  const sums = chart.x.map((_, n) => chart.layers.reduce((sum, layer) => sum + layer.y[n], 0));
  const high = chart.unit === "share" ? 1 : 1.05 * Math.max(...sums);
  const { node, x, y } = frame(chart, 0, high, chart.x[0], chart.x[chart.x.length - 1]);
  let below = chart.x.map(() => 0);
  for (const layer of chart.layers) {
    const above = below.map((value, n) => value + layer.y[n]);
    const back = [...chart.x].reverse();
    const outline = pathOf(chart.x, above, x, y) + pathOf(back, [...below].reverse(), x, y).replace("M", "L") + "Z";
    node.append(svg("path", { d: outline, fill: layer.colour, style: "stroke:var(--card)", "stroke-width": 1 }));
    below = above;
  }
  return withReader(chart, node, x, chart.x, (step) => {
    const place = chart.x.indexOf(step);
    return chart.layers.map((layer) => [layer.colour, layer.label, layer.y[place]]);
  });
}

function heatChart(chart) {
  const count = chart.layers.length;
  const { node, x, y } = frame({ ...chart, unit: "none" }, 0, count, chart.x[0], chart.x[chart.x.length - 1]);
  node.querySelectorAll("line, text[text-anchor=end]").forEach((old) => old.remove());
  const most = Math.max(...chart.layers.flatMap((layer) => layer.y)) || 1;
  const width = (CHART.width - CHART.left - CHART.right) / chart.x.length;
  const place = (n) => CHART.left + n * width;
  chart.layers.forEach((layer, row) => {
    layer.y.forEach((share, n) => node.append(svg("rect", {
      x: place(n), y: y(row + 1), width: width + 0.4, height: y(row) - y(row + 1) + 0.4,
      style: "fill:var(--regime-HT)", opacity: Math.sqrt(share / most).toFixed(3),
    })));
    if (row < count - 1) {
      node.append(svg("text", { x: CHART.left - 6, y: y(row + 1) + 4, "text-anchor": "end" }, layer.label));
    }
  });
  const title = "gap in nats, share of tokens";
  return withReader(chart, node, x, chart.x, (step) => {
    const n = chart.x.indexOf(step);
    return chart.layers.map((layer, row) => {
      const from = row ? chart.layers[row - 1].label : "0";
      return [null, layer.label === "inf" ? `${from} and more` : `${from} to ${layer.label}`, layer.y[n]];
    }).filter(([, , share]) => share >= 0.05);
  }, title);
}

// A line that follows the pointer or the arrow keys, and the values under it.
function withReader(chart, node, x, steps, valuesAt, note) {
  const read = el("p", { class: "read", "aria-live": "off" });
  const cross = svg("line", { class: "cross", y1: CHART.top, y2: CHART.height - CHART.bottom, visibility: "hidden" });
  node.append(cross);
  let current = steps.length - 1;
  const select = (place, visibly) => {
    current = Math.max(0, Math.min(steps.length - 1, place));
    const step = steps[current];
    cross.setAttribute("x1", x(step));
    cross.setAttribute("x2", x(step));
    cross.setAttribute("visibility", visibly ? "visible" : "hidden");
    const values = valuesAt(step).filter(([, , value]) => value !== null);
    read.replaceChildren(el("span", {}, `step ${step}${note ? ", " + note : ""}`), ...values.map(([colour, label, value]) =>
      el("span", {}, colour ? swatch(colour) : null, `${label} ${chart.unit === "share" ? percent(value) : number(value)}`)));
  };
  const follow = (event) => {
    const box = node.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * CHART.width;
    const distances = steps.map((step) => Math.abs(x(step) - at));
    select(distances.indexOf(Math.min(...distances)), true);
  };
  node.addEventListener("pointermove", follow);
  node.addEventListener("pointerdown", follow);
  node.addEventListener("pointerleave", () => select(steps.length - 1, false));
  node.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    event.stopPropagation();
    select(current + move, true);
  });
  select(steps.length - 1, false);
  return el("div", { class: "chart" }, el("h3", {}, chart.title), node, read);
}

if (DATA.charts.length) {
  const makers = { lines: lineChart, stack: stackChart, heat: heatChart };
  show("curves").append(...DATA.charts.map((chart) => makers[chart.kind](chart)));
}
