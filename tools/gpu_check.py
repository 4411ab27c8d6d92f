"""The check on a GPU: three stages of at most 200 s, the most telling first.

    python tools/gpu_check.py [--stage N] [--dry-run] [--output FILE]

1. does everything run, with the results and the bits that it should have; 2. a training step and a
layer against Megatron's; 3. kernels against what the device can do, and offloading. A row is
appended to the file, a line of JSON, as soon as it is measured; a table (``.md``) and profiler
traces go beside it. Nothing is installed: torch and Megatron-Core are enough. The exit code is 1
if a row failed; a target that is missed is shown, and is no failure. ``--dry-run`` takes tiny
shapes on the CPU; its times mean nothing.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from compile_kernels import FOLDERS, ROOT, relocate

sys.path[:0] = FOLDERS

from processes import run_limited  # noqa: E402
from record import (  # noqa: E402
    Case,
    Figures,
    Recorder,
    SkippedError,
    as_markdown,
    machine,
    read_rows,
)

SECONDS = 200.0
GRACE = 10.0  # before that no case begins any more
BROKEN = 75  # exit code of a process whose CUDA context an error has spoilt
START = "Start"
PEERS = ROOT / "benchmarks" / "gpu" / "peer_rows.py"
HIDDEN = ROOT / "benchmarks" / "gpu" / "hidden_clones.py"
SHARING = {
    "two processes on one device": [],
    "a layer with clones, two processes on one device": ["--clones"],
}
SHARED_DEVICE = {"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}


def start_compiling() -> Case:
    """Compile what is missing for this GPU, beside the cases before the one returned."""
    import torch
    from timing import on_gpu

    process: subprocess.Popen | None = None
    if on_gpu():
        major, minor = torch.cuda.get_device_capability()
        words = [sys.executable, str(ROOT / "tools" / "compile_kernels.py")]
        words += ["--cache", os.environ["TRITON_CACHE_DIR"], "--arch", f"{major}{minor}"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    def count() -> Figures:
        if process is None:
            raise SkippedError("needs a GPU")
        output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}")
        return json.loads(output.splitlines()[-1])

    return Case(START, "kernels compiled before", count, seconds=120)


def count_compilations() -> Counter[str]:
    """Counts from now on how many of our kernels this process compiles, and finds compiled."""
    from triton import knobs

    counts: Counter[str] = Counter(hits=0, compiled=0)

    def note(*, src: Any, cache_hit: bool, **_: Any) -> None:
        if getattr(getattr(src, "fn", None), "module", "").startswith("megatron_echo"):
            counts["hits" if cache_hit else "compiled"] += 1

    knobs.compilation.listener = note
    return counts


def first_stage(recorder: Recorder) -> list[Case]:
    """Whether everything runs, with the results that it should have."""
    import capture_safety
    import ceilings
    import kernel_checks
    import offloading
    import training_step
    from ranks import WaitingRanks

    dry, compilation = recorder.dry, start_compiling()
    peers = {name: WaitingRanks(PEERS, words, 2, SHARED_DEVICE) for name, words in SHARING.items()}
    small = training_step.small_runs(recorder)

    def exchange(ranks: WaitingRanks) -> Figures:
        begin = time.monotonic()
        ranks.run(recorder.at_most(50))
        return {"seconds": time.monotonic() - begin}

    return [
        *ceilings.cases(dry),
        compilation,
        *kernel_checks.cases(dry),
        *capture_safety.cases(dry),
        offloading.bits(dry),
        offloading.captured_bits(dry),
        *(Case("Symmetric memory", n, partial(exchange, ranks)) for n, ranks in peers.items()),
        *small.cases,
    ]


def second_stage(recorder: Recorder) -> list[Case]:
    """A layer and a training step; the layers of other models come last."""
    import layers
    import torch
    import training_step
    from ranks import WaitingRanks

    has_ranks = recorder.dry or torch.cuda.device_count() > 1
    ranks = WaitingRanks(HIDDEN, [], 2) if has_ranks else None

    def clones() -> Figures:
        if ranks is None:
            raise SkippedError("needs two GPUs")
        return json.loads(ranks.run(recorder.at_most(50)).splitlines()[-1])

    runs = training_step.runs(recorder, training_step.SPEED)
    small, *others = ("dry run",) if recorder.dry else layers.MODELS
    return [
        *layers.cases_of(recorder, small),
        Case("Clones beside compute", "two ranks", clones),
        *runs.cases,
        *itertools.chain.from_iterable(layers.cases_of(recorder, model) for model in others),
        *layers.profiles(recorder, small),
    ]


def third_stage(recorder: Recorder) -> list[Case]:
    """Kernels by themselves, and offloading."""
    import fp8_products
    import grouped_gemm
    import offloading
    import planner_kernel
    import row_copies
    import training_step

    runs = training_step.runs(recorder, training_step.MEMORY)
    return [
        *planner_kernel.cases(recorder.dry),
        offloading.overlap(),
        *grouped_gemm.cases(recorder.dry),
        *fp8_products.cases(recorder.dry),
        *runs.cases,
        *row_copies.cases(recorder.dry),
    ]


STAGES = {1: first_stage, 2: second_stage, 3: third_stage}


def is_broken() -> bool:
    """Whether an error has spoilt this process's CUDA context."""
    from timing import synchronize

    try:
        synchronize()
    except RuntimeError:
        return True
    return False


def work(stage: int, file: Path, deadline: float, first: int = 0, dry: bool = False) -> int:
    """Run the cases of a stage in this process, from one of them on; returns the exit code.

    While a case runs, a file beside the rows names it.
    """
    begin = time.monotonic()
    from megatron_echo import cpu_backend

    cpu_backend.enable(verbose=False)
    import torch
    from passes import single_rank
    from timing import on_gpu

    if not (dry or on_gpu()):
        raise SystemExit(
            "gpu-check needs a CUDA device and there is none. `make test` needs no GPU."
        )
    recorder = Recorder(stage, file, deadline, machine(dry), dry)
    counts, now = count_compilations(), file.with_suffix(".now")
    # Megatron compiles its activation, and an expert gets any number of tokens.
    with single_rank(), torch._dynamo.config.patch(assume_static_by_default=False):
        cases = STAGES[stage](recorder)
        seconds = time.monotonic() - begin
        cases.insert(0, Case(START, f"imports, stage {stage}", lambda: {"seconds": seconds}))
        cases.append(Case(START, f"kernels, stage {stage}", partial(dict, counts)))
        for number, case in enumerate(cases[first:], first):
            now.write_text(json.dumps([number, case.part, case.name]))
            if not recorder.measure(case) and is_broken():
                return BROKEN
    return 0


def run_stage(stage: int, output: Path, dry: bool) -> bool:
    """Run a stage, going on behind a case that ends the process; whether nothing failed."""
    limit, first = SECONDS * (10 if dry else 1), 0  # a dry run is there to run through
    deadline = time.monotonic() + limit
    rows, now = len(read_rows(output)), output.with_suffix(".now")
    while True:
        now.unlink(missing_ok=True)
        words = [sys.executable, __file__, "--stage", str(stage), "--output", str(output)]
        words += ["--first", str(first), "--until", str(deadline - GRACE)]
        words += ["--dry-run"] if dry else []
        code = run_limited(words, max(0.0, deadline - time.monotonic()), cwd=ROOT)
        if code == 0 or not now.exists():
            break
        number, part, name = json.loads(now.read_text())
        if code != BROKEN:
            note = f"exit code {code}" if code is not None else f"stopped after {limit:.0f} s"
            Recorder(stage, output, 0, machine(dry), dry).fail(Case(part, name, dict), note)
        if code is None:
            break
        first = number + 1
    now.unlink(missing_ok=True)
    ours = read_rows(output)[rows:]
    output.with_suffix(".md").write_text(as_markdown(read_rows(output)) + "\n")
    failed = [f"{row.part}: {row.name}" for row in ours if row.status == "failed"]
    missed = [f"{row.part}: {row.name}" for row in ours if row.reached is False]
    for word, found in (("failed", failed), ("below target", missed)):
        print(f"stage {stage}: {len(found)} {word}{': ' if found else ''}{'; '.join(found)}")
    seconds = time.monotonic() - deadline + limit
    print(f"stage {stage}: {len(ours)} rows in {seconds:.0f} s, in {output}", flush=True)
    return code in (0, None) and not failed


def prepare(dry: bool) -> None:
    """Environment of all processes: where they find compiled code, and what recipes set."""
    for name, folder in (("TRITON_CACHE_DIR", "kernels"), ("TORCHINDUCTOR_CACHE_DIR", "inductor")):
        path = Path(os.environ.get(name) or ROOT / "runs" / folder).resolve()
        path.mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(path)
    relocate(Path(os.environ["TRITON_CACHE_DIR"]))
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.environ |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONWARNINGS": "ignore"}
    os.environ |= {"PYTHONUNBUFFERED": "1", **({"CUDA_VISIBLE_DEVICES": ""} if dry else {})}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--stage", type=int, choices=STAGES, help="one of them; all by default")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu-check.jsonl",
                        help="file that rows are appended to; default %(default)s")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--first", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    output = args.output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    if args.first is not None:
        raise SystemExit(work(args.stage, output, args.until, args.first, args.dry_run))
    prepare(args.dry_run)
    stages = [args.stage] if args.stage else list(STAGES)
    has_passed = [run_stage(stage, output, args.dry_run) for stage in stages]
    raise SystemExit(0 if all(has_passed) else 1)


if __name__ == "__main__":
    main()
