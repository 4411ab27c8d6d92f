// The sections of the page, from the JSON in #report-data.

const runs = JSON.parse(document.getElementById("report-data").textContent);
const section = (id) => document.getElementById(id);
const sides = (id) => section(id).querySelector(".sides");
const RUN_COLORS = ["var(--main)", "var(--other)"];
const letter = (run) => (runs.length > 1 ? "AB"[runs.indexOf(run)] : "");
const prefix = (run) => (letter(run) ? `${letter(run)} ` : "");
const source = (text) => make("div", { class: "source" }, `Source: ${text}`);
const missing = (text) => make("p", { class: "missing" }, text);

function side(run) {
  const element = make("div", { class: "side" });
  if (letter(run)) element.append(make("h3", {}, `${letter(run)}: ${run.name}`));
  return element;
}

function metricSeries(run, key, name, more) {
  const { iteration, values } = run.metrics;
  return { name: prefix(run) + name, xs: iteration, ys: values[key] || [], ...more,
    dash: letter(run) === "B" ? "6 4" : more.dash };
}

function metricChart(id, label, keys, { unit = "", help = "" } = {}) {
  const series = runs.flatMap((run, i) => keys.map(([key, name, more]) =>
    metricSeries(run, key, name, { color: RUN_COLORS[i], ...more })));
  const box = make("div", {});
  const isDrawn = lineChart(box, label, series, { unit });
  const names = keys.map(([key]) => key).filter((key) => runs.some((r) => key in r.metrics.values));
  const every = runs.map((run) => run.metrics.every);
  if (isDrawn) {
    const thinned = Math.max(...every) > 1 ? `; shown is one line in ${every.join(" and ")}` : "";
    box.append(source(`metrics.jsonl: ${names.join(", ")}${thinned}`));
  } else box.append(missing(help || `metrics.jsonl has no ${keys[0][0]}.`));
  section(id).append(box);
  return box;
}

// ------------------------------------------------------------------ what does not change

function showOrigin() {
  for (const run of runs) {
    const groups = Object.entries(run.layout || {}).filter(([, size]) => size && size > 1);
    const parts = [run.started && `started ${run.started}`, run.device,
      groups.map(([name, size]) => `${name} ${size}`).join(", ") || "one rank",
      ...Object.entries(run.versions || {}).filter(([, v]) => v).map(([k, v]) => `${k} ${v}`),
      run.git_commit && `commit ${run.git_commit.slice(0, 12)}`];
    section("origin").append(make("div", {}, prefix(run) && `${prefix(run)}${run.name}: `,
      parts.filter(Boolean).join(" · ")));
  }
}

function showSummary() {
  const labels = [...new Set(runs.flatMap((run) => run.summary.map((row) => row.label)))];
  for (const label of labels) {
    const rows = runs.map((run) => run.summary.find((row) => row.label === label));
    const known = rows.find(Boolean);
    section("summary").querySelector(".cards").append(make("div", { class: "card" }, label,
      ...rows.map((row, i) => make("b", { "data-label": prefix(runs[i]) + label },
        prefix(runs[i]) + (row ? format(row.value, row.unit) : "–"))),
      make("small", {}, known.source)));
  }
}

function showCurves() {
  metricChart("loss", "Loss by iteration",
    [["lm loss", "training", {}], ["lm loss validation", "validation", { dots: true }]]);
  const thin = { thin: true };
  const [routed, placed] = [{ color: "var(--routed)" }, { color: "var(--placed)" }];
  metricChart("balance", "Max over mean load of the ranks by iteration", [
    ["moe_echo/overload_routed", "routed", routed],
    ["moe_echo/overload_routed_max", "routed, highest", { ...routed, ...thin }],
    ["moe_echo/overload_placed", "placed", placed],
    ["moe_echo/overload_placed_max", "placed, highest", { ...placed, ...thin }],
  ], { help: "This run recorded no load of ranks. Start it with --moe-enable-echo." });
  const saved = "moe_echo/seconds_saved";
  if (runs.some((run) => saved in run.metrics.values)) {
    metricChart("balance", "Seconds that clones save a layer call, predicted",
      [[saved, "saved", placed]], { unit: "s" });
  }
  metricChart("time", "Seconds of a step", [["iteration-time", "step", {}]], { unit: "s" });
}

function showLimits() {
  for (const run of runs) {
    const box = side(run);
    sides("limits").append(box);
    if (!run.limits.length) {
      box.append(missing("This run balanced nothing. Start it with --moe-enable-echo."));
      continue;
    }
    box.append(table(["", "", "source"], run.limits.map((row) =>
      [row.label, format(row.value, row.unit), make("small", {}, row.source)])));
    const policy = run.flags.moe_echo_overflow;
    box.append(make("p", {}, policy === "drop"
      ? "Pairs without a row were dropped; the run's output counts them."
      : "No pair was dropped: a step with an overflow stops the run before the optimizer."));
  }
}

function showAnyMetric() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.metrics.values)))].sort();
  const select = section("metric");
  select.append(...names.map((name) => make("option", {}, name)));
  let box = null;
  const draw = () => {
    box?.remove();
    box = metricChart("any", select.value, [[select.value, select.value, {}]]);
  };
  select.addEventListener("change", draw);
  if (names.length) draw();
}

function showFlags() {
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.flags)))].sort();
  const text = (run, name) => (name in run.flags ? JSON.stringify(run.flags[name]) : "–");
  const row = (name) =>
    [make("code", {}, name), ...runs.map((run) => make("code", {}, text(run, name)))];
  const head = ["flag", ...runs.map((run) => prefix(run) + run.name)];
  for (const run of runs) {
    section("flags").append(make("p", {}, make("code", {}, prefix(run) + (run.command || []).join(" "))));
  }
  if (runs.length > 1) {
    const different = names.filter((name) => new Set(runs.map((run) => text(run, name))).size > 1);
    section("flags").append(make("h3", {}, `${different.length} flags differ`),
      table(head, different.map(row)));
  }
  const search = make("input", { type: "search", placeholder: "part of a name" });
  const all = table(head, names.map(row));
  const rows = [...all.querySelectorAll("tbody tr")];
  search.addEventListener("input", () => rows.forEach((element, i) => {
    element.hidden = !names[i].includes(search.value.replaceAll("-", "_").replace(/^_+/, ""));
  }));
  section("flags").append(make("details", {}, make("summary", {}, `All ${names.length} flags`),
    make("label", {}, "find ", search), all), source("run.json: command, flags"));
}

// ------------------------------------------------------------------ steps and layers of traces

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const LIMIT = largestOverload();
const state = { at: 0, layer: null };
const iterations = [...new Set(runs.flatMap((run) =>
  run.trace ? run.trace.steps.map((step) => step.iteration) : []))].sort((a, b) => a - b);
const layerNumbers = [...new Set(runs.flatMap((run) =>
  run.trace ? run.trace.steps.flatMap((step) => step.layers.map((l) => l.layer)) : []))]
  .sort((a, b) => a - b);

// The ends of the colour scale: the highest load over the mean, as a power of two.
function largestOverload() {
  let most = 2;
  for (const run of runs) for (const step of run.trace?.steps || []) for (const l of step.layers) {
    most = Math.max(most, Math.max(...l.load) / (mean(l.load) || 1));
  }
  return 2 ** Math.ceil(Math.log2(most));
}

// Blue below the mean, orange above, by the logarithm; the theme's neutral grey at the mean.
function loadColor(relative) {
  if (relative === 0) return null;
  const part = Math.max(-1, Math.min(1, Math.log2(relative) / Math.log2(LIMIT)));
  const end = part < 0 ? "#2166ac" : "#d1430b";
  return blend(color("--even").trim(), end, Math.abs(part));
}

function blend(from, to, part) {
  const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const a = channels(from), b = channels(to);
  return `rgb(${a.map((value, i) => Math.round(value + (b[i] - value) * part)).join(" ")})`;
}

// A run's step at the slider: the latest that it traced up to there.
function stepOf(run) {
  const steps = run.trace.steps;
  return steps.findLast((step) => step.iteration <= iterations[state.at]) || steps[0];
}

const tracedSource = (run, what) => source(`traces step-*.npz: ${what}` +
  (run.trace.every > 1 ? `; on this page: one in ` +
    `${run.trace.every} of the ${run.trace.traced} traced steps` : ""));

function drawExperts(run) {
  const step = stepOf(run), box = side(run);
  sides("experts").append(box);
  const readout = make("output", { class: "readout" });
  const experts = run.trace.experts, perRank = experts / run.trace.ranks;
  const tell = (row, column) => {
    const one = step.layers[row], load = one.load[column];
    readout.textContent = `step ${step.iteration}, layer ${one.layer}, expert ${column} (home rank ` +
      `${Math.floor(column / perRank)}): ${format(load)} pairs, ` +
      `${format(load / (mean(one.load) || 1))} of the mean`;
  };
  const map = new Heatmap(box, "Load of each expert (columns) in each layer (rows)", {
    rows: step.layers.map((one) => String(one.layer)),
    columns: Array.from({ length: experts }, (_, i) => String(i)),
    paint: (row, column) => {
      const load = step.layers[row].load;
      return loadColor(load[column] / (mean(load) || 1));
    },
    chosen: (row, column) => {
      tell(row, column);
      setLayer(step.layers[row].layer);
    },
  });
  box.append(make("small", {}, "rows: layers, columns: experts"), readout,
    tracedSource(run, "counts, summed over ranks and microbatches"));
  return { map, tell };
}

function drawLayers(run) {
  const step = stepOf(run), box = side(run);
  sides("layers").append(box);
  box.append(beforeAfterKey());
  barChart(box, "Max over mean load of ranks in each layer", step.layers.map((one) => ({
    name: `layer ${one.layer}`,
    bars: ["routed", "placed"].map((name) => ({ title: name, value: one[name][0],
      high: one[name][1], color: `var(--${name})` })),
  })), { line: 1 });
  box.append(make("details", {}, make("summary", {}, "As a table"),
    table(["layer", "routed: mean", "highest", "placed: mean", "highest"], step.layers.map((one) =>
      [one.layer, ...one.routed, ...one.placed].map((value) => format(value))))),
    tracedSource(run, "counts, load_after"));
}

const beforeAfterKey = () => make("div", { class: "key" },
  ...["routed", "placed"].map((name) =>
    make("span", {}, make("i", { style: `border-color: var(--${name})` }), name)));

function drawRanks(run) {
  const step = stepOf(run), box = side(run);
  sides("ranks").append(box);
  const one = step.layers.find((layer) => layer.layer === state.layer);
  if (!one) return void box.append(missing(`This run has no layer ${state.layer}.`));
  const perRank = run.trace.experts / run.trace.ranks;
  box.append(make("h3", {}, `Step ${step.iteration}, layer ${one.layer}, microbatch ${one.fullest}`),
    beforeAfterKey());
  barChart(box, "Load of each rank", one.before.map((_, rank) => ({ name: `rank ${rank}`,
    bars: ["before", "after"].map((name, i) => ({ title: ["routed", "placed"][i],
      value: one[name][rank], color: ["var(--routed)", "var(--placed)"][i] })) })),
    { line: one.bound });
  if (one.clones.length) drawCloneMap(run, one, box);
  const hosted = (rank) => one.clones.filter(([, host]) => host === rank);
  const wording = ([expert, , calls]) =>
    `${expert} (from rank ${Math.floor(expert / perRank)}, ${calls} of ${one.calls})`;
  box.append(table(["rank", "routed", "placed", "clones", "experts (home, microbatches)"],
    one.before.map((before, rank) => [String(rank), format(before), format(one.after[rank]),
      String(hosted(rank).length), hosted(rank).map(wording).join(", ") || "–"])),
    tracedSource(run, "counts, load_after, slot_expert"));
}

function drawCloneMap(run, one, box) {
  const cloned = [...new Set(one.clones.map(([expert]) => expert))];
  const calls = new Map(one.clones.map(([e, rank, n]) => [`${e} ${rank}`, n]));
  const perRank = run.trace.experts / run.trace.ranks;
  const readout = make("output", { class: "readout" });
  box.append(make("h3", {}, "Cloned experts (rows) and the ranks that computed them (columns)"));
  new Heatmap(box, "Which expert was cloned to which rank", {
    rows: cloned.map(String),
    columns: one.before.map((_, rank) => String(rank)),
    paint: (row, rank) => {
      if (Math.floor(cloned[row] / perRank) === rank) return color("--faint");
      const part = (calls.get(`${cloned[row]} ${rank}`) || 0) / one.calls;
      return blend(color("--even").trim(), "#12866a", part);
    },
    chosen: (row, rank) => {
      const expert = cloned[row], home = Math.floor(expert / perRank);
      readout.textContent = rank === home ? `expert ${expert} is at home on rank ${rank}`
        : `expert ${expert} on rank ${rank}: cloned in ` +
          `${calls.get(`${expert} ${rank}`) || 0} of ${one.calls} microbatches`;
    },
  });
  box.append(make("small", {}, "green: clone, grey: home"), readout);
}

let views = [];

function drawStep() {
  section("step-name").textContent = `iteration ${iterations[state.at]}`;
  section("step").setAttribute("aria-valuetext", `iteration ${iterations[state.at]}`);
  const cursors = views.map((view) => view.map?.cursor);
  sides("experts").replaceChildren();
  sides("layers").replaceChildren();
  views = runs.map((run, i) => {
    if (!run.trace) {
      for (const id of ["experts", "layers"]) {
        const box = side(run);
        box.append(missing(run.trace_missing));
        sides(id).append(box);
      }
      return {};
    }
    const view = drawExperts(run);
    drawLayers(run);
    if (cursors[i]) {
      view.map.cursor = cursors[i];
      view.map.draw();
      view.tell(...cursors[i]);
    }
    return view;
  });
  setLayer(state.layer);
}

function setLayer(number) {
  state.layer = number;
  section("layer").value = number;
  sides("ranks").replaceChildren();
  for (const run of runs) if (run.trace) drawRanks(run);
}

function showLegend() {
  const stops = Array.from({ length: 9 }, (_, i) => loadColor(LIMIT ** (i / 4 - 1)));
  section("legend").replaceChildren(`1/${LIMIT}`,
    make("span", { class: "ramp", style: `background: linear-gradient(90deg, ${stops})` }),
    `${LIMIT} times the mean, grey: the mean, crossed out: no token`);
}

function startTraces() {
  if (!iterations.length) {
    section("experts").querySelector(".controls").hidden = true;
    section("layers").hidden = section("ranks").hidden = true;
    sides("experts").append(...runs.map((run) => {
      const box = side(run);
      box.append(missing(run.trace_missing));
      return box;
    }));
    return;
  }
  const slider = section("step"), select = section("layer");
  slider.max = iterations.length - 1;
  select.append(...layerNumbers.map((number) => make("option", {}, String(number))));
  state.layer = layerNumbers[0];
  slider.addEventListener("input", () => {
    state.at = Number(slider.value);
    drawStep();
  });
  select.addEventListener("change", () => setLayer(Number(select.value)));
  showLegend();
  drawStep();
  const redraw = () => {
    showLegend();
    drawStep();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) redraw();
    width = innerWidth;
  });
}

document.querySelector("main").classList.toggle("single", runs.length === 1);
showOrigin();
showSummary();
showCurves();
startTraces();
showLimits();
showOffload();
showMemory();
showParts();
showAnyMetric();
showFlags();
