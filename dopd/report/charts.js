// Curves as SVG: lines with the seeds behind their mean, dots for a single step, stacked shares, a histogram over time.
const CHART = { width: 460, height: 270, right: 12, top: 10, bottom: 44 };
const DIGIT = 7.6;  // width of a digit of a label
const MARKED = 16;  // points of a line up to which each has a dot
const LEAST_RANGE = 0.1;  // of the largest value: less would make noise look like a trend

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
  if (unit === "share") return Math.round(100 * value) + "%";
  return value !== 0 && (Math.abs(value) >= 1e6 || Math.abs(value) < 1e-4) ? value.toExponential(1) : String(value);
}

function chartNode(title) {
  return svg("svg", {
    viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img", tabindex: "0",
    "aria-label": `${title}; left and right arrow keys read values`,
  });
}

// The frame of a chart over steps: grid, ticks and names of both axes; `labels` stand at the ticks of the second axis.
function frame(chart, low, high, first, last, labels) {
  const marks = labels || niceTicks(low, high, 4).map((tick) => [tick, tickText(tick, chart.unit)]);
  const left = 30 + DIGIT * Math.max(...marks.map(([, text]) => text.length));
  const middle = (CHART.top + CHART.height - CHART.bottom) / 2;
  const x = scaleOf(first, last, left, CHART.width - CHART.right);
  const y = scaleOf(low, high, CHART.height - CHART.bottom, CHART.top);
  const node = chartNode(chart.title);
  for (const [at, text] of marks) {
    if (!labels) node.append(svg("line", { class: "grid", x1: left, x2: CHART.width - CHART.right, y1: y(at), y2: y(at) }));
    node.append(svg("text", { x: left - 6, y: y(at) + 4, "text-anchor": "end" }, text));
  }
  for (const tick of first === last ? [first] : niceTicks(first, last, 5)) {
    if (!Number.isInteger(tick)) continue;
    node.append(svg("text", { x: first === last ? (left + CHART.width) / 2 : x(tick), y: CHART.height - 26, "text-anchor": "middle" }, String(tick)));
  }
  node.append(
    svg("text", { class: "axis", x: (left + CHART.width - CHART.right) / 2, y: CHART.height - 6, "text-anchor": "middle" }, "optimizer step"),
    svg("text", { class: "axis", transform: `translate(13 ${middle}) rotate(-90)`, "text-anchor": "middle" }, chart.axis));
  return { node, x, y, left };
}

function pathOf(xs, ys, x, y) {
  return xs.map((value, n) => `${n ? "L" : "M"}${x(value).toFixed(1)},${y(ys[n]).toFixed(1)}`).join("");
}

function rangeOf(chart, values) {
  const [least, most] = [Math.min(...values), Math.max(...values)];
  if (chart.unit === "share") return [0, Math.min(1, Math.max(LEAST_RANGE, 1.15 * most))];
  const room = Math.max(0.06 * (most - least), (LEAST_RANGE * Math.max(Math.abs(most), Math.abs(least)) - (most - least)) / 2) || 1;
  return [least >= 0 && (least < 0.6 * most || least < room) ? 0 : least - room, most + room];
}

function dot(x, y, colour, radius, opacity) {
  return svg("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: radius, style: `fill:${colour}`, opacity });
}

function lineLegend(chart) {
  return [...chart.series.map(({ label, colour, dash }) => ({ label, hue: colour, place: dash })),
    ...chart.levels.map(({ label }) => ({ label, hue: "var(--soft)", place: 2 }))];
}

function lineChart(chart) {
  const steps = [...new Set(chart.series.flatMap((series) => series.x))].sort((a, b) => a - b);
  if (steps.length === 1) return dotChart(chart, steps[0]);
  const all = chart.series.flatMap((series) => [series, ...series.seeds]);
  const [low, high] = rangeOf(chart, [...all.flatMap((series) => series.y), ...chart.levels.map((level) => level.y)]);
  const { node, x, y, left } = frame(chart, low, high, steps[0], steps[steps.length - 1]);
  for (const level of chart.levels) {
    node.append(svg("line", { class: "level", x1: left, x2: CHART.width - CHART.right, y1: y(level.y), y2: y(level.y) }));
    node.append(svg("text", { x: CHART.width - CHART.right, y: y(level.y) + (y(level.y) < 26 ? 15 : -5), "text-anchor": "end" }, level.label));
  }
  // The method of interest is drawn last, over the others.
  for (const series of [...chart.series].sort((a, b) => b.dash - a.dash)) {
    const main = series.dash === 0;
    const line = (points, width, opacity, dashes) => svg("path", {
      d: pathOf(points.x, points.y, x, y), fill: "none", style: `stroke:${series.colour}`, "stroke-width": width, opacity,
      "stroke-dasharray": dashes || null, "stroke-linejoin": "round",
    });
    const few = series.x.length <= MARKED;
    for (const seed of series.seeds) {
      node.append(line(seed, 1, 0.35, ""));
      if (few) node.append(...seed.x.map((step, n) => dot(x(step), y(seed.y[n]), series.colour, 2, 0.5)));
    }
    node.append(line(series, main ? 3 : 2, main ? 1 : 0.8, dashOf(series.dash)));
    if (few) node.append(...series.x.map((step, n) => dot(x(step), y(series.y[n]), series.colour, main ? 4 : 3.2, main ? 1 : 0.9)));
  }
  return withReader(chart, node, x, steps, (step) => chart.series.map((series) => {
    const place = series.x.indexOf(step);
    return [lineSample(series.colour, series.dash), series.label, place < 0 ? null : series.y[place]];
  }), { legend: lineLegend(chart) });
}

// One step alone: a row for each method with its value, and every seed as a small dot.
function dotChart(chart, step) {
  const values = chart.series.flatMap((series) => [...series.y, ...series.seeds.flatMap((seed) => seed.y)]);
  const [low, high] = rangeOf(chart, [...values, ...chart.levels.map((level) => level.y)]);
  const node = chartNode(chart.title);
  const x = scaleOf(low, high, 20, CHART.width - 78);
  const bottom = CHART.height - CHART.bottom;
  const height = Math.min(56, (bottom - CHART.top) / chart.series.length);
  for (const tick of niceTicks(low, high, 4)) {
    node.append(svg("line", { class: "grid", x1: x(tick), x2: x(tick), y1: CHART.top, y2: bottom }),
      svg("text", { x: x(tick), y: CHART.height - 26, "text-anchor": "middle" }, tickText(tick, chart.unit)));
  }
  node.append(svg("text", { class: "axis", x: x((low + high) / 2), y: CHART.height - 6, "text-anchor": "middle" }, `${chart.axis} at step ${step}`));
  for (const level of chart.levels) {
    node.append(svg("line", { class: "level", x1: x(level.y), x2: x(level.y), y1: CHART.top, y2: bottom }));
  }
  chart.series.forEach((series, row) => {
    const y = CHART.top + height * row + height / 2;
    const main = series.dash === 0;
    node.append(svg("line", { x1: x(low), x2: x(series.y[0]), y1: y, y2: y, style: `stroke:${series.colour}`, "stroke-width": main ? 3 : 2, "stroke-dasharray": dashOf(series.dash) || null }));
    node.append(...series.seeds.map((seed) => dot(x(seed.y[0]), y, series.colour, 3, 0.45)), dot(x(series.y[0]), y, series.colour, 5.5, 1));
    node.append(svg("text", { class: "value", x: x(series.y[0]) + 12, y: y + 5 }, chart.unit === "share" ? percent(series.y[0]) : number(series.y[0])));
  });
  const read = el("p", { class: "read" }, el("span", {}, `step ${step}, the only one that was logged`),
    ...chart.series.map((series) => el("span", {}, lineSample(series.colour, series.dash), series.label)));
  return chartPart(chart, node, read, lineLegend(chart));
}

// A step alone is as wide as the chart.
function widened(chart) {
  if (chart.x.length > 1) return chart;
  return { ...chart, x: [chart.x[0], chart.x[0] + 1], layers: chart.layers.map((layer) => ({ ...layer, y: [layer.y[0], layer.y[0]] })) };
}

function stackChart(chart) {
  const drawn = widened(chart);
  const sums = drawn.x.map((_, n) => drawn.layers.reduce((sum, layer) => sum + layer.y[n], 0));
  const high = chart.unit === "share" ? 1 : 1.05 * Math.max(...sums) || 1;
  const [first, last] = [drawn.x[0], drawn.x[drawn.x.length - 1]];
  const { node, x, y, left } = frame(chart, 0, high, chart.x[0], chart.x[chart.x.length - 1]);
  const across = chart.x.length > 1 ? x : scaleOf(first, last, left, CHART.width - CHART.right);
  let below = drawn.x.map(() => 0);
  for (const layer of drawn.layers) {
    const above = below.map((value, n) => value + layer.y[n]);
    const back = [...drawn.x].reverse();
    const outline = pathOf(drawn.x, above, across, y) + pathOf(back, [...below].reverse(), across, y).replace("M", "L") + "Z";
    node.append(svg("path", { d: outline, fill: layer.colour, style: "stroke:var(--card)", "stroke-width": 1 }));
    below = above;
  }
  const legend = chart.layers.map((layer) => ({ label: layer.label, hue: layer.colour, place: null }));
  return withReader(chart, node, across, chart.x, (step) => {
    const place = chart.x.indexOf(step);
    return chart.layers.map((layer) => [swatch(layer.colour), layer.label, layer.y[place]]);
  }, { legend });
}

function heatChart(chart) {
  const count = chart.layers.length;
  const edges = chart.layers.slice(0, -1).map((layer, row) => [row + 1, layer.label]);
  const { node, y, left } = frame({ ...chart, unit: "none" }, 0, count, chart.x[0], chart.x[chart.x.length - 1], edges);
  const most = Math.max(...chart.layers.flatMap((layer) => layer.y)) || 1;
  const width = (CHART.width - left - CHART.right) / chart.x.length;
  chart.layers.forEach((layer, row) => {
    layer.y.forEach((share, n) => node.append(svg("rect", {
      x: left + n * width, y: y(row + 1), width, height: y(row) - y(row + 1),
      style: "fill:var(--ink)", "shape-rendering": "crispEdges", opacity: (0.85 * Math.sqrt(share / most)).toFixed(3),
    })));
  });
  const x = (step) => left + (chart.x.indexOf(step) + 0.5) * width;
  return withReader(chart, node, x, chart.x, (step) => {
    const n = chart.x.indexOf(step);
    return chart.layers.map((layer, row) => {
      const from = row ? chart.layers[row - 1].label : "0";
      return [null, layer.label === "inf" ? `${from} and more` : `${from} to ${layer.label}`, layer.y[n]];
    }).filter(([, , share]) => share >= 0.05);
  }, { note: "share of tokens by gap", legend: [{ label: "the darker, the more tokens", hue: "var(--soft)", place: null }] });
}

function chartPart(chart, node, read, legend) {
  return el("figure", { class: "chart" }, el("figcaption", {}, el("h3", {}, chart.title),
    figureDownloads(chart.title, () => standalone(node, chart.title, legend))), node, read);
}

// A line that follows the pointer or the arrow keys, and the values under it.
function withReader(chart, node, x, steps, valuesAt, { note, legend }) {
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
    read.replaceChildren(el("span", {}, `step ${step}${note ? ", " + note : ""}`), ...values.map(([sample, label, value]) =>
      el("span", {}, sample, `${label} ${chart.unit === "share" ? percent(value) : number(value)}`)));
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
  return chartPart(chart, node, read, legend);
}

if (DATA.charts.length) {
  const makers = { lines: lineChart, stack: stackChart, heat: heatChart };
  show("curves").append(...DATA.charts.map((chart) => makers[chart.kind](chart)));
}
