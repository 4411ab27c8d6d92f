// Drawing: elements, number formats, line charts, bars and heatmaps. Knows nothing of runs.

function make(tag, attributes = {}, ...children) {
  const isSvg = ["svg", "path", "line", "rect", "text", "g"].includes(tag);
  const element = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function format(value, unit = "") {
  if (typeof value !== "number") return value === null || value === undefined ? "–" : String(value);
  if (unit === "%") return `${format(100 * value)} %`;
  if (unit === "bytes") return `${format(value / 2 ** 20)} MiB`;
  const text = Number.isInteger(value) ? value.toLocaleString("en")
    : Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en")
    : Math.abs(value) < 1e-3 ? value.toExponential(3) : String(Number(value.toPrecision(5)));
  return unit ? `${text} ${unit}` : text;
}

// Round numbers that divide low..high into about four parts.
function ticks(low, high) {
  const rough = (high - low || 1) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + step / 1e6; n++) found.push(n * step);
  return found;
}

const color = (name) =>
  name.startsWith("--") ? getComputedStyle(document.documentElement).getPropertyValue(name) : name;

const WIDTH = 480, HEIGHT = 210, LEFT = 54, RIGHT = 10, TOP = 8, BOTTOM = 24;

// An empty chart: axes, and functions from data to its coordinates.
function frame(label, xs, [low, high], unit) {
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
  const first = Math.min(...xs), span = Math.max(...xs) - first || 1;
  const range = high - low || 1;
  const x = (value) => LEFT + ((value - first) / span) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / range) * (HEIGHT - TOP - BOTTOM);
  for (const value of ticks(low, high)) {
    svg.append(make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value),
      stroke: "var(--line)" }));
    svg.append(make("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" },
      format(Number(value.toPrecision(6)), unit)));
  }
  return { svg, x, y };
}

const isNumber = (value) => typeof value === "number";

// series: [{name, xs, ys, color, dash, thin, dots}]; ys may hold null, for a step that was
// not recorded, and words (nan), which make gaps. at: what xs count.
function lineChart(parent, label, series, { unit = "", stacked = false, at: what = "iteration" } = {}) {
  series = series.filter((one) => one.ys.some(isNumber));
  if (!series.length) return false;
  const drawn = stacked ? stack(series) : series;
  const values = drawn.flatMap((one) => one.ys.filter(isNumber));
  const low = stacked ? 0 : Math.min(...values), high = Math.max(...values);
  const pad = stacked ? 0 : (high - low || Math.abs(high) || 1) * 0.05;
  const xs = [...new Set(series.flatMap((one) => one.xs))].sort((a, b) => a - b);
  const { svg, x, y } = frame(label, xs, [low - pad, high + pad || 1], unit);
  for (const value of ticks(xs[0], xs.at(-1)).filter(Number.isInteger)) {
    svg.append(make("text", { x: x(value), y: HEIGHT - 6, "text-anchor": "middle" }, format(value)));
  }
  for (const one of drawn) {
    let path = "", pen = "M";
    one.xs.forEach((at, i) => {
      if (one.ys[i] === null || one.ys[i] === undefined) return;
      if (!isNumber(one.ys[i])) return void (pen = "M");
      path += `${pen}${x(at).toFixed(1)} ${y(one.ys[i]).toFixed(1)}`;
      if (one.dots) path += "h.01";
      pen = one.dots ? "M" : "L";
    });
    if (one.floor) {
      path += one.xs.map((at, i) => `L${x(at).toFixed(1)} ${y(one.floor[i]).toFixed(1)}`)
        .reverse().join("") + "Z";
    }
    svg.append(make("path", { d: path, fill: one.floor ? one.color : "none", stroke: one.color,
      "stroke-width": one.dots ? 6 : one.thin ? 1 : 2, "stroke-dasharray": one.dash || "none",
      "stroke-linejoin": "round", "stroke-linecap": one.dots ? "round" : "butt" }));
  }
  const cursor = make("line", { y1: TOP, y2: HEIGHT - BOTTOM, stroke: "var(--ink)",
    visibility: "hidden" });
  svg.append(cursor);
  const readout = make("output", {});
  let at = xs.length - 1;
  const show = (index) => {
    at = Math.max(0, Math.min(xs.length - 1, index));
    cursor.setAttribute("visibility", "visible");
    cursor.setAttribute("x1", x(xs[at]));
    cursor.setAttribute("x2", x(xs[at]));
    const parts = series.map((one) => [one.name, one.ys[one.xs.indexOf(xs[at])]])
      .filter(([, value]) => value !== undefined && value !== null)
      .map(([name, value]) => `${name} ${format(value, unit)}`);
    readout.textContent = `${what} ${format(xs[at])}: ${parts.join(" · ")}`;
  };
  svg.setAttribute("tabindex", 0);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const where = ((event.clientX - box.left) / box.width) * WIDTH;
    let best = 0;
    xs.forEach((value, i) => {
      if (Math.abs(x(value) - where) < Math.abs(x(xs[best]) - where)) best = i;
    });
    show(best);
  });
  onArrows(svg, (dx) => show(at + dx));
  const key = make("div", { class: "key" });
  for (const one of series) {
    const sample = make("i", { style: `border-color: ${one.color}; border-top-style: ` +
      (one.dots ? "dotted" : one.dash ? "dashed" : "solid") +
      (one.thin ? "; border-top-width: 1px" : "") });
    key.append(make("span", {}, sample, one.name));
  }
  parent.append(key, svg, readout);
  return true;
}

// Each series on top of those before it; missing values count as nothing.
function stack(series) {
  let floor = series[0].xs.map(() => 0);
  return series.map((one) => {
    const ys = floor.map((under, i) => under + (isNumber(one.ys[i]) ? one.ys[i] : 0));
    const drawn = { ...one, ys, floor };
    floor = ys;
    return drawn;
  });
}

function onArrows(element, move) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  element.addEventListener("keydown", (event) => {
    if (!steps[event.key]) return;
    event.preventDefault();
    move(...steps[event.key]);
  });
}

// groups: [{name, bars: [{value, high, color, title}]}], drawn upwards from zero.
function barChart(parent, label, groups, { line = null } = {}) {
  const values = groups.flatMap((group) => group.bars.flatMap((bar) => [bar.value, bar.high || 0]));
  const top = 1.05 * Math.max(line || 0, 1e-9, ...values);
  const { svg, y } = frame(label, [0, 1], [0, top], "");
  const slot = (WIDTH - LEFT - RIGHT) / groups.length;
  const every = Math.ceil(groups.length / 16);
  groups.forEach((group, i) => {
    const thick = (slot * 0.8) / group.bars.length;
    group.bars.forEach((bar, j) => {
      const left = LEFT + slot * (i + 0.1) + thick * j;
      svg.append(make("rect", { x: left, y: y(bar.value), width: thick,
        height: y(0) - y(bar.value), fill: bar.color, "data-value": bar.value },
        svgTitle(`${group.name}, ${bar.title}: ${format(bar.value)}` +
          (bar.high ? `, highest ${format(bar.high)}` : ""))));
      if (bar.high) {
        svg.append(make("line", { x1: left, x2: left + thick, y1: y(bar.high), y2: y(bar.high),
          stroke: "var(--ink)", "stroke-width": 2 }));
      }
    });
    if (i % every === 0) {
      svg.append(make("text", { x: LEFT + slot * (i + 0.5), y: HEIGHT - 6,
        "text-anchor": "middle" }, group.name.replace(/^\D+/, "")));
    }
  });
  if (line !== null) {
    svg.append(make("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y(line), y2: y(line),
      stroke: "var(--ink)", "stroke-dasharray": "4 3" }));
  }
  parent.append(svg);
}

function svgTitle(text) {
  const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
  title.textContent = text;
  return title;
}

function table(head, rows) {
  const cells = (tag, values) =>
    make("tr", {}, ...values.map((value) => make(tag, tag === "th" ? { scope: "col" } : {}, value)));
  return make("div", { class: "scroll" }, make("table", {}, make("thead", {}, cells("th", head)),
    make("tbody", {}, ...rows.map((row) => cells("td", row)))));
}

// A canvas of rows x columns with a cursor for pointer and arrow keys.
// paint(row, column) gives a colour, or null for a crossed-out cell.
class Heatmap {
  constructor(parent, label, { rows, columns, paint, chosen }) {
    Object.assign(this, { rows, columns, paint, chosen });
    this.margin = 14 + 7 * Math.max(...rows.map((row) => row.length));
    const room = parent.clientWidth - this.margin - 2;
    this.wide = Math.max(7, Math.min(48, Math.floor(room / columns.length)));
    this.high = rows.length > 24 ? 12 : 20;
    this.canvas = make("canvas", { role: "img", "aria-label": label, tabindex: 0 });
    parent.append(make("div", { class: "scroll" }, this.canvas));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse") this.point(event);
    });
    onArrows(this.canvas, (dx, dy) => {
      const [row, column] = this.cursor || [0, 0];
      this.choose(row + dy, column + dx);
    });
    this.draw();
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - this.margin) / this.wide);
    const row = Math.floor((event.clientY - box.top) / this.high);
    if (column >= 0 && column < this.columns.length && row >= 0 && row < this.rows.length) {
      this.choose(row, column);
    }
  }

  choose(row, column) {
    this.cursor = [Math.max(0, Math.min(this.rows.length - 1, row)),
      Math.max(0, Math.min(this.columns.length - 1, column))];
    this.draw();
    this.chosen(...this.cursor);
  }

  draw() {
    const { canvas, wide, high, margin } = this;
    const width = margin + wide * this.columns.length + 1;
    const height = high * this.rows.length + 18;
    const scale = window.devicePixelRatio || 1;
    canvas.width = width * scale;
    canvas.height = height * scale;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    const gap = wide > 9 ? 1 : 0;
    const faint = color("--faint");
    pen.scale(scale, scale);
    pen.font = "11px system-ui, sans-serif";
    pen.strokeStyle = faint;
    this.rows.forEach((name, row) => {
      pen.fillStyle = faint;
      pen.textAlign = "right";
      pen.fillText(name, margin - 6, high * (row + 0.5) + 4);
      this.columns.forEach((_, column) => {
        const left = margin + wide * column, top = high * row;
        const fill = this.paint(row, column);
        pen.fillStyle = fill || color("--paper");
        pen.fillRect(left, top, wide - gap, high - gap);
        if (fill === null) {
          pen.beginPath();
          const size = Math.min(wide, high) / 2 - 3, x = left + wide / 2, y = top + high / 2;
          pen.moveTo(x - size, y - size);
          pen.lineTo(x + size, y + size);
          pen.stroke();
        }
      });
    });
    const every = Math.ceil(36 / wide);
    pen.fillStyle = faint;
    pen.textAlign = "center";
    this.columns.forEach((name, column) => {
      if (column % every === 0) pen.fillText(name, margin + wide * (column + 0.5), height - 5);
    });
    if (this.cursor) {
      pen.strokeStyle = color("--ink");
      pen.lineWidth = 2;
      pen.strokeRect(margin + wide * this.cursor[1], high * this.cursor[0], wide - gap, high - gap);
    }
  }
}
