"""Megatron-Core's own configurations: judged from their flags, and trained beside its layer."""

import argparse
import functools
import importlib.util
from pathlib import Path

import launch
import pytest
import upstream_matrix
from megatron.training.arguments import add_megatron_arguments, validate_args
from upstream_matrix import Config

from megatron_echo import environment
from megatron_echo.arguments import add_echo_arguments, echo_config_from_args
from megatron_echo.offload.training import add_offload_arguments
from megatron_echo.preflight import check_flags
from megatron_echo.record.metrics import read_metrics

CONFIGS = upstream_matrix.load()
QUICK = ("moe/gpt3_mcore_te_tp2_pp1_te_8experts2parallel_top2router",)
QUICK += ("hybrid/hybrid_flextron_nightly_tp2_pp1_ep2_dgx_h100_1N8G",)


@functools.cache
def parser() -> argparse.ArgumentParser:
    """Megatron's, which takes a second to build, with our flags."""
    made = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    add_offload_arguments(made, [])
    return add_echo_arguments(made)


def judge(config: Config) -> str:
    """What the checks before a run say, without starting one; nothing where they pass."""
    words = environment.add_missing_flags(config.argv(ours=True), has_cuda=False, verbose=False)
    args = parser().parse_args(words)
    args._is_global_batch_size_explicitly_specified = True
    args.rank, args.world_size = 0, config.ranks
    try:
        check_flags(args)
        validate_args(args)
        echo_config_from_args(args)
    except ValueError as refusal:
        return str(refusal)
    return ""


def test_all_are_judged() -> None:
    """By the flags alone: in the words of the table, or not at all."""
    names = [name for config in CONFIGS for name in config.names]
    assert len(set(names)) == len(names) == 51
    for config in CONFIGS:
        wanted = config.refusal
        package = config.package or config.stand_in
        if package and importlib.util.find_spec(package) is None:
            wanted = f"needs the package {package}"
        words = judge(config)
        assert bool(wanted) == bool(words), (config.names, words)
        assert wanted in words, (config.names, words)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            config,
            id=config.names[0],
            marks=[pytest.mark.slow] if not set(QUICK) & set(config.names) else [],
        )
        for config in (*CONFIGS, *upstream_matrix.OWN)
        if not config.refusal
    ],
)
def test_it_follows_megatrons_layer(config: Config, tmp_path: Path) -> None:
    """The same losses and gradient norms."""
    if config.package:
        pytest.importorskip(config.package)
    curves = []
    for ours in (True, False):
        run_dir = tmp_path / f"ours {ours}"
        argv = config.argv(ours=ours, run_dir=run_dir)
        result = launch.run(argv, config.ranks, config.script)
        if config.build_refusal:
            assert config.build_refusal in result.output
            assert result.codes == (2,) * config.ranks
            return
        result.check()
        curves += [[(m["lm loss"], m["grad-norm"]) for m in read_metrics(run_dir)]]
    assert len(curves[0]) == config.steps
    for ours, theirs in zip(*curves, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
