"""The main job: train a small mixture of experts on real text and say how well it went.

Builds the corpus, starts ``torchrun pretrain_gpt_moe.py``, shows the progress, and ends with the
losses and where everything is. Every argument is passed on to ``pretrain_gpt_moe.py``, after the
job's own, so that it wins::

    python tools/main_job.py --train-iters 50 --moe-router-topk 4
"""

import logging
import os
import re
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from build_corpus import CACHE, VOCAB_SIZE, build_corpus

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_echo.observe.report import build_report  # noqa: E402
from megatron_echo.record.metrics import read_metrics  # noqa: E402

SEQ_LENGTH = 256
GLOBAL_BATCH_SIZE = 16
TRAIN_ITERS = 200
CLEARLY_BELOW = 0.8
ROUTED, PLACED, CLONES = (
    "moe_echo/overload_routed",
    "moe_echo/overload_placed",
    "moe_echo/clones",
)
ITERATION = re.compile(
    r"iteration +(\d+)/ *(\d+) .*elapsed time per iteration \(ms\): ([\d.]+) .*lm loss: (\S+)"
)


def num_processes() -> int:
    """Two where there are two devices or none, one on a single GPU."""
    return min(2, torch.cuda.device_count()) if torch.cuda.is_available() else 2


def training_flags(corpus_dir: Path, run_dir: Path, held_out_tokens: int) -> list[str]:
    """The flags of the main job for ``pretrain_gpt_moe.py``.

    The evaluation takes every whole sequence of the held-out files once.
    """
    processes = num_processes()
    eval_iters = held_out_tokens // (SEQ_LENGTH * GLOBAL_BATCH_SIZE)
    flags = f"""
        --num-layers 4 --hidden-size 128 --num-attention-heads 4 --ffn-hidden-size 256
        --seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH}
        --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear
        --attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights
        --num-experts 8 --moe-router-topk 2 --moe-ffn-hidden-size 128
        --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
        --expert-model-parallel-size {processes}
        --micro-batch-size {GLOBAL_BATCH_SIZE // processes} --global-batch-size {GLOBAL_BATCH_SIZE}
        --train-iters {TRAIN_ITERS} --lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine
        --lr-warmup-iters 10 --adam-beta2 0.95 --clip-grad 1.0 --weight-decay 0.1
        --tokenizer-type NullTokenizer --vocab-size {VOCAB_SIZE} --num-workers 0
        --train-data-path {corpus_dir / "train"} --valid-data-path {corpus_dir / "heldout"}
        --data-cache-path {corpus_dir / CACHE}
        --eval-interval 1000000 --eval-iters {eval_iters} --log-interval 10
        --save {run_dir / "checkpoints"} --save-interval 1000000
        --tensorboard-dir {run_dir / "tensorboard"} --run-dir {run_dir}
    """
    return flags.split() + (["--bf16"] if torch.cuda.is_available() else [])


def last_value(flags: Sequence[str], name: str) -> str:
    """The value of a flag on a command line where later ones win."""
    value = ""
    for word, following in zip(flags, [*flags[1:], ""], strict=True):
        if word == name:
            value = following
        elif word.startswith(name + "="):
            value = word.split("=", 1)[1]
    return value


def run_training(flags: Sequence[str], log: Path) -> None:
    """Run ``pretrain_gpt_moe.py``, show a line for each logged iteration, keep the rest in a log.

    Raises:
        SystemExit: the training failed; the end of its output has been printed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(num_processes()), str(ROOT / "pretrain_gpt_moe.py"), *flags]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore"}
    environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines: list[str] = []
    with open(log, "w") as file:
        for line in process.stdout:
            file.write(line)
            lines.append(line)
            if match := ITERATION.search(line):
                step, total, milliseconds, loss = match.groups()
                print(
                    f"  iteration {step:>4}/{total}   lm loss {float(loss):.3f}   "
                    f"{float(milliseconds):.0f} ms/iteration",
                    flush=True,
                )
            elif line.startswith("Evaluating on"):
                print("  evaluating ...", flush=True)
    if process.wait() != 0:
        print("".join(lines[-40:]), file=sys.stderr)
        raise SystemExit(f"Training failed (exit code {process.returncode}); all of it: {log}")


def plot_losses(metrics: list[dict], unigram: float, held_out: float | None, path: Path) -> None:
    """Save the loss curve, with the unigram entropy as a line to beat, and the ranks' balance."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [line["iteration"] for line in metrics if "lm loss" in line]
    losses = [line["lm loss"] for line in metrics if "lm loss" in line]
    balance = [line for line in metrics if ROUTED in line]
    figure, panels = pyplot.subplots(
        1, 2 if balance else 1, figsize=(12 if balance else 7, 4), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    axes = panels[0, 0]
    if balance:
        load = panels[0, 1]
        at = [line["iteration"] for line in balance]
        load.plot(at, [line[ROUTED] for line in balance], color="tab:orange", label="as routed")
        load.plot(at, [line[PLACED] for line in balance], color="tab:green", label="as computed")
        load.set(xlabel="iteration", ylabel="fullest rank / mean", title="Load of the ranks")
        load.grid(alpha=0.3)
        load.legend()
    axes.plot(steps, losses, color="tab:blue", label="training")
    axes.axhline(unigram, color="tab:gray", linestyle="--", label="unigram entropy, held-out")
    if held_out is not None:
        axes.plot(steps[-1], held_out, "o", color="tab:red", label="held-out files")
    axes.set(xlabel="iteration", ylabel="loss (nats per byte)", title="MoE, 8 experts, top-2")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """The command line."""
    started = time.monotonic()
    warnings.simplefilter("ignore")  # Megatron warns of each optional package that is absent
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    runs = ROOT / "runs"
    print("Building the corpus from this Python's standard library ...", flush=True)
    corpus = build_corpus(runs / "corpus", Path(sysconfig.get_path("stdlib")))
    unigram = corpus["heldout"]["unigram_entropy"]
    print(
        f"  {corpus['train']['files']} files to train on, {corpus['heldout']['files']} held out, "
        f"{(corpus['train']['tokens'] + corpus['heldout']['tokens']) / 1e6:.1f} MB; unigram "
        f"entropy of the held-out bytes {unigram:.3f} nats",
        flush=True,
    )
    run_dir = runs / time.strftime("train-%Y%m%d-%H%M%S")
    held_out_tokens = corpus["heldout"]["tokens"]
    flags = training_flags(runs / "corpus", run_dir, held_out_tokens)
    flags += ["--moe-enable-echo", "--moe-echo-trace-every", "10"]
    flags += ["--moe-echo-trace-dir", str(run_dir / "traces")]
    flags += ["--memory-ledger", str(run_dir / "ledger.json")]
    flags += ["--timing-log-level", "1" if torch.cuda.is_available() else "2", *sys.argv[1:]]
    run_dir = Path(last_value(flags, "--run-dir"))
    run_dir.mkdir(parents=True, exist_ok=True)
    where = f"{num_processes()} GPU(s)" if torch.cuda.is_available() else "the CPU, 2 processes"
    print(f"Training on {where}; the whole output goes to {run_dir / 'log.txt'} ...", flush=True)
    run_training(flags, run_dir / "log.txt")

    metrics = read_metrics(run_dir)
    trained = [line for line in metrics if "lm loss" in line]
    held_out = metrics[-1].get("lm loss validation")
    seconds = sorted(line["iteration-time"] for line in trained)[len(trained) // 2]
    tokens = int(last_value(flags, "--global-batch-size")) * int(last_value(flags, "--seq-length"))
    plot = run_dir / "loss.png"
    plot_losses(metrics, unigram, held_out, plot)
    print(f"\nDone in {time.monotonic() - started:.0f} s.")
    print(f"  training loss    {trained[0]['lm loss']:.3f} -> {trained[-1]['lm loss']:.3f} nats")
    if held_out is not None:
        print(
            f"  held-out loss    {held_out:.3f} nats; unigram entropy of those bytes {unigram:.3f}"
        )
    if balance := [line for line in trained if ROUTED in line]:
        routed, placed, clones = (
            sum(line[name] for line in balance) / len(balance) for name in (ROUTED, PLACED, CLONES)
        )
        print(
            f"  fullest rank     {routed:.3f} x the mean as routed, {placed:.3f} x as computed "
            f"({clones:.1f} clones a layer and microbatch)"
        )
    print(f"  speed            {tokens / seconds:,.0f} tokens/s (median iteration {seconds:.3f} s)")
    page = run_dir / "report.html"
    page.write_text(build_report([run_dir]))
    print(f"  report           {page}   (opens in a browser, without a network)")
    print(f"  loss plot        {plot}")
    print(f"  metrics          {run_dir / 'metrics.jsonl'}, {run_dir / 'run.json'}")
    print(f"  TensorBoard      {last_value(flags, '--tensorboard-dir')}")
    print(f"  checkpoint       {last_value(flags, '--save')}")
    if len(sys.argv) == 1 and (held_out is None or held_out > CLEARLY_BELOW * unigram):
        raise SystemExit("The held-out loss is not clearly below the unigram entropy: a defect.")


if __name__ == "__main__":
    main()
