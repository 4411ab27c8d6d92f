"""EchoMoELayer with Triton's grouped products against the same with torch's.

In Triton's interpreter; the argument names a check, a function ``check_...`` below.
"""

import itertools
from unittest import mock

import torch
import torch.distributed as dist
import triton_interpreter
from torch import Tensor
from unit_tests.workers.clones import case_of, cloned, plain
from unit_tests.workers.moe_layer import (
    Problem,
    dense,
    errors,
    fill_uninitialized_memory,
    main,
    report,
    run,
    same_bits,
)

from megatron_echo import cpu_backend
from megatron_echo.dispatch import permute
from megatron_echo.experts import activation, activation_kernels, grouped_linear, kernels
from megatron_echo.experts.clones import WeightPool
from megatron_echo.moe_layer import EchoMoELayer

# Of the largest value: eight units in the last place of fp32, as the two sum in another order, and
# one of bf16.
LIMITS = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8}


def layer_of(kind: str, dtype: torch.dtype, slots: int, keep: bool) -> EchoMoELayer:
    """With S clone slots, or none, and the grouped products of ``kind``."""
    fields = {"moe_echo_grouped_gemm": kind, "moe_echo_recompute_expert_dispatch": not keep}
    return cloned(2, dtype, slots, **fields) if slots else plain(2, dtype, **fields)


def run_in_triton(layer: EchoMoELayer, case: Problem) -> dict[str, Tensor]:
    """Forward and backward: four products and two weight gradients, all of them Triton's."""
    with (
        triton_interpreter.mended(),
        mock.patch.object(kernels, "product", wraps=kernels.product) as products,
        mock.patch.object(kernels, "outer", wraps=kernels.outer) as outers,
        mock.patch.object(grouped_linear, "grouped_mm", side_effect=AssertionError),
    ):
        result = run(layer, case)
    assert (products.call_count, outers.call_count) == (4, 2)
    return result


def check_the_results_of_torch() -> None:
    """Output and all gradients, with and without clones; the pool holds the slots alone."""
    worst = dict.fromkeys(LIMITS, 0.0)
    slots_of = itertools.cycle((6, 0, 1, 6) if dist.get_world_size() > 1 else (0,))
    for dtype, kind in itertools.product(LIMITS, ("hot", "empty", "padding")):
        slots, case = next(slots_of), case_of(kind, 2, dtype)
        keep = kind == "padding"
        expected = run(layer_of("torch", dtype, slots, keep), case)
        layer = layer_of("triton", dtype, slots, keep)
        found = errors(run_in_triton(layer, case), {k: v.double() for k, v in expected.items()})
        assert max(found.values()) <= LIMITS[dtype], (dtype, kind, slots, found)
        worst[dtype] = max(worst[dtype], *found.values())
        expert = sum(weight[0].nbytes for weight in layer.experts.parameters())
        assert WeightPool.of(layer.config).nbytes == slots * expert
    report("triton against torch", {str(dtype): f"{value:.1e}" for dtype, value in worst.items()})


def check_every_kernel() -> None:
    """With those of the copies and of the activation too, and NaN in all uninitialised memory.

    The same bits on every run. In bf16 torch's activation is rounded three times, ours once.
    """
    for dtype, limit in ((torch.float32, LIMITS[torch.float32]), (torch.bfloat16, 2.0**-6)):
        case = case_of("hot", 2, dtype)
        fields = {"moe_echo_row_alignment": 4, "moe_received_token_capacity": 2.0}
        layers = [
            cloned(2, dtype, 6, moe_echo_grouped_gemm=kind, **fields)
            for kind in ("torch", "triton")
        ]
        expected = {name: tensor.double() for name, tensor in run(layers[0], case).items()}
        runs = []
        torch.use_deterministic_algorithms(True)
        for is_filled in (False, True):
            fill_uninitialized_memory(is_filled)
            with (
                mock.patch.object(permute, "on_gpu", return_value=True),
                mock.patch.object(activation, "on_gpu", return_value=True),
                mock.patch.object(
                    activation_kernels, "forward", wraps=activation_kernels.forward
                ) as activations,
            ):
                runs.append(run_in_triton(layers[1], case))
            assert activations.call_count == 2  # once in each pass
        torch.use_deterministic_algorithms(False)
        same_bits(*runs)
        found = errors(runs[0], expected)
        assert max(found.values()) <= limit, (dtype, found)


def check_bf16() -> None:
    """Gradients of the weights are as near to fp64 as torch's."""
    case, squares = case_of("hot", 2, torch.bfloat16), []
    exact = dense(plain(2, torch.bfloat16), case)
    for way in (run, run_in_triton):
        result = way(layer_of("torch" if way is run else "triton", torch.bfloat16, 6, False), case)
        misses = [(result[name].double() - exact[name]).square().sum() for name in ("dfc1", "dfc2")]
        squares.append(torch.stack(misses))
    whole = torch.stack(squares)
    dist.all_reduce(whole)
    ratio = (whole[1] / whole[0]).sqrt()
    assert (ratio <= 1.05).all(), ratio


if __name__ == "__main__":
    triton_interpreter.patch_once()
    cpu_backend.enable(verbose=False)
    main(globals())
