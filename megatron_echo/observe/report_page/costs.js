// What a step costs: its time by part, offloaded bytes, and memory by module.

const HUES = [212, 30, 160, 330, 55, 280, 100, 0, 190];
const hue = (i) => `hsl(${HUES[i % HUES.length]} 55% 50%)`;

// Where the time of a step goes: its parts stacked, and their medians.
function showParts() {
  for (const run of runs) {
    const box = side(run);
    sides("time").append(box);
    if (!run.parts.length) {
      box.append(missing("metrics.jsonl has no timers. Start the run with --timing-log-level 2 " +
        "(1 for fewer parts) to see what a step consists of."));
      continue;
    }
    const series = run.parts.map((part, i) =>
      ({ name: part.label, xs: run.metrics.iteration, ys: part.values, color: hue(i) }));
    lineChart(box, "Parts of a step in seconds", series, { unit: "s", stacked: true });
    const whole = run.parts.reduce((sum, part) => sum + part.median, 0);
    box.append(table(["part", "median ms", "share", "source"], run.parts.map((part) =>
      [part.label, format(Number((1e3 * part.median).toPrecision(4))),
        format(Number((part.median / whole).toPrecision(2)), "%"),
        make("small", {}, part.source)])), source("metrics.jsonl: timers of the last rank"));
  }
}

const FATES = [["reloaded", "brought back"], ["forwarded", "used before it left"],
  ["dropped", "never used"]];
const mebibytes = (values) => values.map((n) => (isNumber(n) ? n / 2 ** 20 : null));

// What became of the bytes that could have been offloaded, and why the others stayed.
function fatesOf(values) {
  const kept = Object.keys(values).map((key) => /^offload\/(kept_(.*))_bytes$/.exec(key))
    .filter(Boolean).map(([, name, reason]) => [name, `kept: ${reason.replace("_", " ")}`]);
  return [...FATES, ...kept].filter(([name]) =>
    values[`offload/${name}_bytes`]?.some((value) => value > 0));
}

function showOffload() {
  for (const run of runs) {
    const { iteration, values } = run.metrics;
    const box = side(run);
    sides("offload").append(box);
    const series = (names) => names.map(([key, name, color], i) => ({ name, xs: iteration,
      color: color || hue(i), ys: mebibytes(values[`offload/${key}_bytes`] || []) }));
    const timeline = [["planned", "planned", "var(--main)"], ["hidden", "hidden", "var(--placed)"],
      ["exposed", "exposed", "var(--routed)"]];
    if (!lineChart(box, "Offloaded: planned, hidden, exposed", series(timeline), { unit: "MiB" })) {
      box.append(missing("This run offloaded nothing. Start it with " +
        "--fine-grained-activation-offloading and --offload-modules."));
      continue;
    }
    box.append(
      source("metrics.jsonl: offload/planned_bytes, hidden_bytes, exposed_bytes, sums over ranks"),
      make("h3", {}, "What became of all that could go"));
    lineChart(box, "Bytes by fate", series(fatesOf(values)), { unit: "MiB", stacked: true });
    box.append(source("metrics.jsonl: offload/*_bytes, sums over ranks"));
  }
}

function showMemory() {
  for (const run of runs) {
    const box = side(run);
    sides("memory").append(box);
    if (!run.ledgers.length) {
      box.append(missing("This run kept no ledger. Start it with --memory-ledger " +
        "RUN_DIR/ledger.json."));
    }
    for (const ledger of run.ledgers) {
      box.append(make("h3", {}, `${ledger.file}: ${format(ledger.peak, "bytes")} at the peak`));
      const series = Object.entries(ledger.curves).map(([name, ys], i) =>
        ({ name, xs: ledger.events, ys: mebibytes(ys), color: hue(i) }));
      lineChart(box, "Bytes kept by module", series, { unit: "MiB", stacked: true, at: "event" });
      box.append(table(["module", "at the peak", "saved in the step", "storages"],
        ledger.modules.map(([name, peak, saved, storages]) => [make("code", {}, name),
          format(peak, "bytes"), format(saved, "bytes"), format(storages)])));
      if (ledger.taken) {
        box.append(make("p", {}, `${format(ledger.taken, "bytes")} besides are kept elsewhere: ` +
          "on the host, or recomputed."));
      }
      box.append(source(`${ledger.file}: entries; across, saves and frees in order`));
    }
  }
}
