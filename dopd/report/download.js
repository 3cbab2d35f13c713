// Downloads, made in the page itself: figures as SVG and PNG, tables as CSV and LaTeX. Nothing is fetched or sent.
const PNG_SCALE = 3;
const DRAWN_STYLES = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "opacity", "font-family", "font-size", "font-weight", "text-anchor"];
const DASHES = ["", "8 4", "2 4", "12 4 2 4"];

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null));
  return node;
}

// How a method's line looks, beside its name: solid for the method of interest (0), dashed and lighter for others.
function dashOf(place) {
  return place ? DASHES[1 + ((place - 1) % (DASHES.length - 1))] : "";
}

function lineSample(colour, place) {
  return svg("svg", { class: "sample", width: 26, height: 10, "aria-hidden": "true" },
    svg("line", { x1: 1, x2: 25, y1: 5, y2: 5, style: `stroke:${colour}`, "stroke-width": place ? 2 : 3, "stroke-dasharray": dashOf(place) }));
}

function fileName(name) {
  const parts = `${DATA.title} ${name}`.toLowerCase().match(/[a-z0-9]+/g) || ["dopd"];
  return parts.join("-").slice(0, 80);
}

function save(name, ending, blob) {
  const url = URL.createObjectURL(blob);
  const link = el("a", { href: url, download: `${fileName(name)}.${ending}` });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

const KINDS = {
  SVG: { ending: "svg", type: "image/svg+xml" }, CSV: { ending: "csv", type: "text/csv" }, LaTeX: { ending: "tex", type: "text/x-tex" },
};

// Buttons that save what the functions in `made` give: a text, or for PNG an SVG element.
function downloads(name, made) {
  return el("div", { class: "downloads", role: "group", "aria-label": `download ${name}` }, Object.entries(made).map(([kind, make]) =>
    el("button", {
      type: "button", "data-kind": kind, title: `download ${name} as ${kind}`, "aria-label": `download ${name} as ${kind}`,
      onclick: () => (kind === "PNG" ? savePng(name, make()) : save(name, KINDS[kind].ending, new Blob([make()], { type: `${KINDS[kind].type};charset=utf-8` }))),
    }, kind)));
}

function figureDownloads(name, make) {
  return downloads(name, { SVG: () => svgText(make()), PNG: make });
}

// Signs that XML cannot hold, such as control characters and halves of a pair, are left out.
function svgText(node) {
  const text = new XMLSerializer().serializeToString(node)
    .replace(/[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "");
  return `<?xml version="1.0" encoding="UTF-8"?>\n${text}\n`;
}

function savePng(name, node) {
  const [width, height] = ["width", "height"].map((side) => Number(node.getAttribute(side)));
  const canvas = el("canvas", { width: Math.round(width * PNG_SCALE), height: Math.round(height * PNG_SCALE) });
  const picture = new Image();
  picture.addEventListener("load", () => {
    canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.toBlob((blob) => save(name, "png", blob), "image/png");
  });
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svgText(node))}`;
}

// A drawing of the page as one that stands alone: in light colours, its styles written into it, with title and legend.
function standalone(drawing, title, legend) {
  const root = document.documentElement;
  const theme = root.dataset.theme;
  root.dataset.theme = "light";
  const [, , width, height] = drawing.getAttribute("viewBox").split(" ").map(Number);
  const copy = drawing.cloneNode(true);
  const originals = [...drawing.querySelectorAll("*")];
  [...copy.querySelectorAll("*")].forEach((node, n) => {
    const style = getComputedStyle(originals[n]);
    node.removeAttribute("style");
    node.removeAttribute("class");
    for (const name of DRAWN_STYLES) {
      const value = style.getPropertyValue(name);
      if (value) node.setAttribute(name, value);
    }
    if (style.visibility === "hidden") node.remove();
  });
  const colour = (name) => {
    const probe = el("span");
    probe.style.color = name;
    document.body.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  };
  const family = "system-ui, sans-serif";
  const rows = legendRows(legend, width);
  const whole = 30 + height + 20 * rows.length + 6;
  const node = svg("svg", { xmlns: "http://www.w3.org/2000/svg", width, height: whole, viewBox: `0 0 ${width} ${whole}`, "font-family": family },
    svg("title", {}, title),
    svg("rect", { width, height: whole, fill: colour("var(--card)") }),
    svg("text", { x: 10, y: 20, "font-size": 15, "font-weight": 600, fill: colour("var(--ink)") }, title),
    svg("g", { transform: "translate(0 28)" }, [...copy.childNodes]),
    rows.map((row, n) => row.map(({ x, label, hue, place }) => svg("g", { transform: `translate(${x} ${28 + height + 20 * n + 12})` },
      place === null ? svg("rect", { y: -9, width: 12, height: 12, fill: colour(hue) })
        : svg("line", { x1: 0, x2: 24, y1: -4, y2: -4, stroke: colour(hue), "stroke-width": place ? 2 : 3, "stroke-dasharray": dashOf(place) || null }),
      svg("text", { x: place === null ? 18 : 30, y: 1, "font-size": 13, fill: colour("var(--ink)") }, label)))));
  if (theme === undefined) delete root.dataset.theme;
  else root.dataset.theme = theme;
  return node;
}

// Entries of a legend in lines that fit; `place` is null for an area.
function legendRows(legend, width) {
  const rows = [];
  let x = width;
  for (const entry of legend) {
    const room = 44 + 7.6 * entry.label.length;
    if (x + room > width) {
      rows.push([]);
      x = 10;
    }
    rows[rows.length - 1].push({ ...entry, x });
    x += room;
  }
  return rows;
}

// Header and rows of a table as texts; a cell with an interval becomes the three columns mean, low and high.
function tableCells(node) {
  const names = [...node.querySelectorAll("thead th")].map((cell) => cell.textContent);
  const kept = names.map((_, n) => n).filter((n) => n === 0 || names[n]);  // a column without a name is a drawing
  const header = kept.map((n) => names[n]);
  const rows = [...node.querySelectorAll("tbody tr")].map((row) => kept.map((n) => row.children[n]));
  const split = header.map((_, n) => rows.some((row) => row[n] && row[n].dataset.mean !== undefined));
  const text = (cell) => ((cell && cell.dataset.text) || (cell ? (cell.querySelector(":scope > span, code") || cell).textContent : ""));
  const numbers = (cell) => ["mean", "low", "high"].map((name) => (cell && cell.dataset[name]) || "");
  return {
    header, rows: rows.map((row) => header.map((_, n) => text(row[n]))),
    wide: {
      header: header.flatMap((name, n) => (split[n] ? [name, `${name}: low`, `${name}: high`] : [name])),
      rows: rows.map((row) => header.flatMap((_, n) => (split[n] ? numbers(row[n]) : [text(row[n])]))),
    },
  };
}

// A text that a spreadsheet would run as a formula gets an apostrophe in front.
function csvCell(text) {
  const safe = /^[=+\-@\t\r]/.test(text) && !/^(-|[+-]?[\d.]+(e[+-]?\d+)?)$/i.test(text) ? `'${text}` : text;
  return /[",\r\n]/.test(safe) ? `"${safe.replace(/"/g, '""')}"` : safe;
}

function tableCsv(node) {
  const { header, rows } = tableCells(node).wide;
  return [header, ...rows].map((row) => row.map(csvCell).join(",") + "\r\n").join("");
}

const LATEX = {
  "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", $: "\\$", "&": "\\&", "#": "\\#", _: "\\_", "%": "\\%",
  "^": "\\textasciicircum{}", "~": "\\textasciitilde{}", "<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}", '"': "\\textquotedbl{}",
};

function latexCell(text) {
  return text.replace(/[\\{}$&#_%^~<>|"]/g, (sign) => LATEX[sign]).replace(/[\x00-\x1f\x7f]+/g, " ")
    .replace(/(^|[\s[])-(?=\d)/g, "$1$$-$$");
}

function tableLatex(node, name) {
  const { header, rows } = tableCells(node);
  const line = (row) => `  {${row.map(latexCell).join("} & {")}} \\\\`;
  // Columns of sentences are broken into lines; what is still wider than a line of the document is scaled to it.
  const sort = (n) => (Math.max(...rows.map((row) => row[n].length)) > 40 ? "p{4cm}" : n ? "r" : "l");
  return [
    "% needs \\usepackage{booktabs,graphicx} and \\usepackage[T1]{fontenc}", "\\begin{table}", "  \\centering",
    `  \\caption{${latexCell(`${DATA.title}: ${name}`)}}`, "  \\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
    `  \\begin{tabular}{${header.map((_, n) => sort(n)).join("")}}`, "  \\toprule",
    line(header), "  \\midrule", ...rows.map(line), "  \\bottomrule", "  \\end{tabular}}", "\\end{table}", "",
  ].join("\n");
}
