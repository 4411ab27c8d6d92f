"""EchoMoELayer over the stand-in of HybridEP, or NCCL EP, against the same over all-gather.

The argument names a check, a function ``check_...`` below; with NCCL_EP in the environment NCCL EP.
"""

import itertools
import os
from typing import Any

import hybrid_ep_stand_in
import nccl_ep_stand_in
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from moe_cases import experts_for, layer_config
from unit_tests.workers.clones import case_of, inference
from unit_tests.workers.moe_layer import (
    ROUTINGS,
    dense,
    errors,
    kept,
    main,
    report,
    run,
    run_quietly,
    same_bits,
)

from megatron_echo import cpu_backend
from megatron_echo.dispatch.transports import HybridEPTransport, NcclEPTransport
from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.step.step_end import StepEnd
from megatron_echo.testing import no_host_sync

LIMITS = {torch.float64: 1e-6, torch.float32: 1e-6}  # probabilities travel in fp32
ENGINE = "nccl_ep" if os.environ.get("NCCL_EP") else "hybrid_ep"
TRANSPORTS = {"hybrid_ep": HybridEPTransport, "nccl_ep": NcclEPTransport}
STAND_IN = [f"hybrid_ep_stand_in.py:{name}" for name in ("_plan", "_fill", "_sums")]
STAND_IN += ["nccl_ep_stand_in.py:nccl_ep_dispatch"]


def build(topk: int, dtype: torch.dtype, wire: str = ENGINE, **fields: Any) -> EchoMoELayer:
    """A layer; the same weights on every call. The stand-in takes the dtypes that are refused."""
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    config = layer_config(dist.get_world_size(), topk, dtype, **fields)
    config.moe_echo_token_transport = wire
    config.moe_echo_expert_dispatcher_type = "collective"  # a CPU's own choice reads plans
    layer = EchoMoELayer(config)
    is_ours = isinstance(layer.token_dispatcher._transport, TRANSPORTS[ENGINE])
    assert is_ours == (wire == ENGINE)
    nccl_ep_stand_in.bootstrapped.clear()  # each layer of its own sizes is another process's
    return layer


def check_the_results_of_all_gather() -> None:
    """Output and all gradients: routings, top-k, alignment, with and without clones."""
    worst = dict.fromkeys(LIMITS, 0.0)
    variants = itertools.cycle(itertools.product((1, 4), (0, experts_for(dist.get_world_size()))))
    for dtype, kind, topk in itertools.product(LIMITS, ROUTINGS, (1, 3)):
        alignment, slots = next(variants)
        fields = {"moe_echo_row_alignment": alignment, "moe_num_echo_experts": slots}
        case, wires = case_of(kind, topk, dtype), ("all_gather", ENGINE)
        results = [run(build(topk, dtype, wire, **fields), case) for wire in wires]
        found = errors(results[1], {name: value.double() for name, value in results[0].items()})
        assert max(found.values()) <= LIMITS[dtype], (kind, topk, fields, found)
        worst[dtype] = max(worst[dtype], *found.values())
    report(ENGINE, {str(dtype): f"{value:.1e}" for dtype, value in worst.items()})


def check_overflow() -> None:
    """What has no row is counted, as it is with the other transports."""
    dropped_in_all = 0
    for kind, alignment in itertools.product(("hot", "random"), (1, 4)):
        case = case_of(kind, 2, torch.float32)
        fields = {"moe_echo_row_alignment": alignment, "moe_received_token_capacity": 0.4}
        counts = []
        for wire in ("all_gather", ENGINE):
            layer = build(2, torch.float32, wire, moe_echo_overflow="drop", **fields)
            found = run(layer, case)
            check = StepEnd.of(layer.config).overflow
            check.check()
            counts.append(check.dropped)
        rest, dropped, _ = kept(case, layer.token_dispatcher.buffer_rows(12), alignment)
        assert counts == [dropped, dropped]
        assert max(errors(found, dense(layer, rest)).values()) <= 1e-5
        dropped_in_all += dropped
    assert dropped_in_all > 0


def check_no_host_sync() -> None:
    """Nothing but the stand-in itself reads the host; one buffer serves all layers and calls."""
    made = hybrid_ep_stand_in.HybridEPBuffer.made
    layer = build(2, torch.float32, moe_num_echo_experts=experts_for(dist.get_world_size()))
    case = case_of("hot", 2, torch.float32)
    same_bits(run(layer, case), run(layer, case))
    with no_host_sync("raise", STAND_IN):
        run_quietly(layer, case)
    run(EchoMoELayer(layer.config), case)
    if ENGINE == "hybrid_ep":
        assert hybrid_ep_stand_in.HybridEPBuffer.made == made + 1
    else:
        assert len(nccl_ep_stand_in.bootstrapped) == 1


def check_evaluation() -> None:
    """Other numbers of tokens, without gradients, and a capacity that is for training only."""
    case, fields = case_of("hot", 2, torch.float64), {"moe_received_token_capacity": 0.3}
    expected = build(2, torch.float64, "all_gather", **fields).eval()
    layer = build(2, torch.float64, **fields).eval()
    for tokens in (12, 4):
        with torch.no_grad():
            difference = inference(layer, case, tokens) - inference(expected, case, tokens)
        assert difference.abs().max() <= 1e-6


if __name__ == "__main__":
    cpu_backend.enable(verbose=False)
    hybrid_ep_stand_in.install()
    nccl_ep_stand_in.install()
    main(globals())
