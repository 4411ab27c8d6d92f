"""EchoMoELayer whose experts compute in FP8, over all ranks; the argument names a check."""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import moe_cases
import torch
import torch.distributed as dist
import torch.utils.checkpoint
import triton_interpreter
from moe_cases import ShapeRecorder
from torch import Tensor
from unit_tests.workers import moe_layer
from unit_tests.workers.clones import (
    case_of,
    cloned,
    of_tensor_ranks,
    plain,
    sliced,
    with_biases,
)
from unit_tests.workers.moe_layer import (
    RESULTS,
    dense,
    errors,
    main,
    problem,
    report,
    run,
    run_quietly,
    same_bits,
)

from megatron_echo import cpu_backend
from megatron_echo.dispatch import permute
from megatron_echo.dispatch.transports import CollectiveWeights, TokenTransport
from megatron_echo.experts import activation, fp8, fp8_linear, kernels
from megatron_echo.experts.fp8 import pack_rows, unpacked
from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.precision import FORMATS, Fp8Format
from megatron_echo.step.self_check import EchoCheckError, SelfCheck
from megatron_echo.step.step_end import StepEnd
from megatron_echo.testing import no_host_sync

FP8: dict[str, Any] = {"moe_echo_expert_precision": "fp8-rowwise", "moe_ffn_hidden_size": 16}
TOPK, DTYPE = 3, torch.float32
BLOCKS = ("mxfp8", "fp8-blockwise")


@contextlib.contextmanager
def as_wide_as(precision: str) -> Iterator[dict[str, Any]]:
    """Layers whose widths are one block of a format, and its fields."""
    width = FORMATS[precision].alignment
    with contextlib.ExitStack() as stack:
        for module in (moe_cases, moe_layer):
            stack.enter_context(mock.patch.object(module, "HIDDEN", width))
        yield {"moe_echo_expert_precision": precision, "moe_ffn_hidden_size": width}


KINDS = ("hot", "random", "padding", "idle rank")
WAYS = ("collective", "p2p", "symmetric_memory")
WIRES = ("all_gather", "all_to_all", "symmetric_memory")


def sizes_of_errors(
    actual: dict[str, Tensor], expected: dict[str, Tensor], names: tuple[str, ...] = RESULTS
) -> dict[str, float]:
    """Norm of the error over the norm, of all ranks together, of each tensor."""
    squares = [
        t.double().square().sum() for n in names for t in (actual[n] - expected[n], expected[n])
    ]
    total = torch.stack(squares)
    dist.all_reduce(total)
    pairs = total.sqrt().view(-1, 2).tolist()
    return {name: error / size for name, (error, size) in zip(names, pairs, strict=True)}


def check_clones() -> None:
    """Clones change nothing but the order of sums, however they travel; and the error of FP8.

    Against the fp64 loop the errors are those of e4m3, and of the layer without clones too.
    """
    for precision, kinds in (
        ("fp8-rowwise", ("hot", "hot", *KINDS)),
        *((b, KINDS) for b in BLOCKS),
    ):
        with as_wide_as(precision) as fields:
            of_clones, of_format = worst_differences(kinds, fields)
        report(f"{precision}: worst differences by clones", of_clones)
        report(f"{precision}: worst errors of the format", of_format)
        assert max(of_clones.values()) < 1e-5
        assert all(0.04 < error < 0.10 for error in of_format.values())


def of_all_sizes(layer: EchoMoELayer) -> EchoMoELayer:
    """Neighbours among the experts have other scales."""
    for weight in weights_of(layer):
        number = dist.get_rank() * len(weight) + torch.arange(len(weight))
        with torch.no_grad():
            weight *= (number % 3 - 1).exp2()[:, None, None]
    return layer


def worst_differences(kinds: tuple[str, ...], fields: dict[str, Any]) -> tuple[dict, dict]:
    """By clones, and to the fp64 loop."""
    of_format, of_clones = (dict.fromkeys(RESULTS, 0.0) for _ in range(2))
    for number, (kind, way) in enumerate(zip(kinds, itertools.cycle(WAYS))):
        case = case_of(kind, TOPK, DTYPE)
        unmoved = run(of_all_sizes(plain(TOPK, DTYPE, **fields)), case)
        layer = cloned(
            TOPK, DTYPE, **fields, moe_echo_expert_dispatcher_type=way,
            moe_echo_recompute_expert_dispatch=bool(number % 2),
        )  # fmt: skip
        moved = run(of_all_sizes(layer), case)
        StepEnd.of(layer.config).overflow.check()
        by_clones, by_format = errors(moved, unmoved), sizes_of_errors(moved, dense(layer, case))
        for name in RESULTS:
            of_clones[name] = max(of_clones[name], by_clones[name])
            of_format[name] = max(of_format[name], by_format[name])
        same_bits(run(layer, case), moved)
    return of_clones, of_format


def rows_of(layer: EchoMoELayer, case: Any) -> tuple[list[tuple], dict[str, Tensor]]:
    """What the experts are given, and the results."""
    given: list[tuple] = []
    hook = layer.experts.register_forward_pre_hook(lambda _, arguments: given.append(arguments))
    result = run(layer, case)
    hook.remove()
    return given, result


def check_travel() -> None:
    """Tokens quantised before they travel: every bit is that of tokens quantised behind it.

    Padding between groups is zero, scales too: nothing of it reaches a gradient.
    """
    kinds = (("hot", 1), ("padding", 32))
    for (kind, alignment), wire in itertools.product(kinds, WIRES):
        travels(
            "fp8-rowwise", kind, moe_echo_token_transport=wire, moe_echo_row_alignment=alignment
        )
    for precision, wire in zip(BLOCKS, WIRES, strict=False):
        travels(precision, "padding", moe_echo_token_transport=wire)


def travels(precision: str, kind: str, **fields: Any) -> None:
    form = FORMATS[precision]
    with as_wide_as(precision) as more:
        fields |= more
        case = case_of(kind, TOPK, DTYPE)
        ((stand, ends, _, _, packed),), travelled = rows_of(cloned(TOPK, DTYPE, **fields), case)
        with mock.patch.object(TokenTransport, "moves_any_bits", False):
            unmoved = cloned(TOPK, DTYPE, **fields)
        ((rows, _, _, _, none),), expected = rows_of(unmoved, case)
        same_bits(travelled, expected)
        assert none is None
        assert (stand.shape, stand.dtype) == (rows.shape, rows.dtype)
        assert stand.untyped_storage().nbytes() == stand.itemsize
        assert (packed.dtype, packed.shape[1]) == (torch.int32, rows.shape[1] // 4 + 4)
        used, again = slice(int(ends[-1])), pack_rows(rows, form)
        found, wanted = (unpacked(each[used], form).dequantised() for each in (packed, again))
        assert torch.equal(found, wanted)


def check_biases_and_doubt() -> None:
    """GPT-OSS's experts in FP8 with clones and without; and a layer that checks itself."""
    case = case_of("hot", 2, DTYPE)
    layers = (with_biases(2, DTYPE, slots, **FP8, moe_echo_check_every=slots) for slots in (0, 1))
    unmoved, layer = layers
    found, expected = run(layer, case), run(unmoved, case)
    assert max(errors(found, expected).values()) < 1e-5
    StepEnd.of(layer.config).end_step()
    exact = dense(layer, case)
    assert set(exact) > set(RESULTS)
    sizes = sizes_of_errors(found, exact, tuple(exact))
    assert 0.03 < sizes["output"] < 0.1, sizes
    assert max(sizes.values()) < 0.3, sizes  # the clamp lets another gradient through
    record = SelfCheck.record

    def doubled(self: Any, actual: Tensor, *rest: Any) -> None:
        record(self, 1.1 * actual, *rest)

    with mock.patch.object(SelfCheck, "record", doubled):
        run(layer, case)
        message = ""
        try:
            StepEnd.of(layer.config).end_step()
        except EchoCheckError as error:
            message = str(error)
    assert "from itself without (limit 6.2e-02)" in message, message


def check_sync_and_shapes() -> None:
    """Nothing is read on the host, and the same operators run for every routing and rank."""
    for way, wire, precision in (
        ("collective", "all_to_all", "fp8-rowwise"),
        ("symmetric_memory", "symmetric_memory", "mxfp8"),
        ("collective", "all_gather", "fp8-blockwise"),
        ("symmetric_memory", "symmetric_memory", "fp8-rowwise"),
    ):
        with as_wide_as(precision) as fields:
            no_reads_and_one_shape(fields, way, wire)


def no_reads_and_one_shape(fields: dict[str, Any], way: str, wire: str) -> None:
    seen = set()
    for kind in ("hot", "random"):
        layer = cloned(
            TOPK, DTYPE, **fields, moe_echo_expert_dispatcher_type=way,
            moe_echo_token_transport=wire,
        )  # fmt: skip
        case = case_of(kind, TOPK, DTYPE)
        with no_host_sync("raise") as sync, ShapeRecorder() as recorder:
            run_quietly(layer, case)
        assert sync.hits == []
        seen.add(tuple(recorder.made))
    assert len(seen) == 1, way


def weights_of(layer: EchoMoELayer) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    return layer.experts.linear_fc1.weight, layer.experts.linear_fc2.weight


def check_once_a_step() -> None:
    """Weights are quantised in the first microbatch of a step, and travel in bytes.

    A second microbatch, recomputation and backward quantise none. A step that ends, a state that
    is loaded, and evaluation do so again; what evaluation quantised is not kept.
    """
    for precision in FORMATS:
        with as_wide_as(precision) as fields:
            quantised_once_a_step(fields, FORMATS[precision])


def quantised_once_a_step(fields: dict[str, Any], form: Fp8Format) -> None:
    layer, case = cloned(TOPK, DTYPE, **fields), case_of("hot", TOPK, DTYPE)
    quantise = fp8_linear.quantise_matrices
    states = [
        {name: (type(t), getattr(t, "dtype", None)) for name, t in each.state_dict().items()}
        for each in (layer, cloned(TOPK, DTYPE, moe_ffn_hidden_size=form.alignment))
    ]
    assert states[0] == states[1]  # checkpoints know nothing of FP8

    def calls_of(layer: EchoMoELayer, case: Any = case) -> tuple[int, dict]:
        with mock.patch.object(fp8_linear, "quantise_matrices", wraps=quantise) as spy:
            result = run(layer, case)
        return spy.call_count, result

    sent: list[int] = []
    push = CollectiveWeights.push

    def note(self: Any, weight: Any, *rest: Any) -> None:
        sent.append(weight[0].nbytes)
        push(self, weight, *rest)

    with mock.patch.object(CollectiveWeights, "push", note):
        first, result = calls_of(layer)
    shapes = [weight.shape[1:] for weight in weights_of(layer)]
    shapes = [*shapes, shapes[1][::-1], shapes[0][::-1]]
    if form.block is None:
        assert sent == [out * width + 4 * out for out, width in shapes]
    else:  # values, then scales
        pieces = [out * width for out, width in shapes]
        scales = [piece // form.block // form.lines for piece in pieces]
        scales = [-(-size // 16) * 16 for size in scales]
        assert sent == [size for pair in zip(pieces, scales, strict=True) for size in pair]
    again, same = calls_of(layer)
    same_bits(same, result)
    StepEnd.of(layer.config).end_step()
    after, _ = calls_of(layer)
    for linear in (layer.experts.linear_fc1, layer.experts.linear_fc2):
        linear.load_state_dict({"weight": linear.weight.detach() + 1})
    changed, other = calls_of(layer)
    assert not torch.equal(other["output"], result["output"])
    keeping = cloned(TOPK, DTYPE, **fields, moe_echo_recompute_expert_dispatch=False)
    with torch.no_grad(), mock.patch.object(fp8_linear, "quantise_matrices", wraps=quantise) as spy:
        for evaluated in (layer, layer, keeping):
            evaluated(case.mine().hidden.view(6, 2, -1))
    assert spy.call_count == 3 * 2  # two projections, forward only, each time
    back, _ = calls_of(layer)
    found = [first, again, after, changed, back]
    assert found == [4, 0, 4, 4, 2], found  # two projections, two directions
    dist.barrier()


def check_settings() -> None:
    """Recomputation of each kind and ranks that share a sequence change no bit.

    Each weight is quantised once for both passes. Clones change the order of sums only, with
    probabilities on the input, and where ranks share experts.
    """
    case = case_of("hot", 2, DTYPE)
    layer = cloned(2, DTYPE, 2, **FP8)
    expected = run(layer, case)
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    layers = [cloned(2, DTYPE, 2, **FP8, **recompute)]
    for is_reentrant in (True, False):
        layers.append(cloned(2, DTYPE, 2, **FP8))
        layers[-1].forward = functools.partial(
            torch.utils.checkpoint.checkpoint, layers[-1].forward, use_reentrant=is_reentrant
        )
    for again in layers:
        with mock.patch.object(
            fp8_linear, "quantise_matrices", wraps=fp8_linear.quantise_matrices
        ) as spy:
            same_bits(run(again, case), expected)
        assert spy.call_count == 4
    on_input = {**FP8, "moe_apply_probs_on_input": True}
    agree(*(cloned(2, DTYPE, slots, **on_input) for slots in (0, 2)), case)
    of_tensor_ranks(1)
    same_bits(run(sliced(1, DTYPE, 2, **FP8), case), expected)
    fields = {**FP8, "moe_ffn_hidden_size": 32}
    case = problem("hot", 2, DTYPE, experts=moe_cases.experts_for(of_tensor_ranks(2)))
    agree(*(sliced(2, DTYPE, slots, **fields) for slots in (0, 2)), case, slices=2)


def agree(unmoved: EchoMoELayer, moved: EchoMoELayer, case: Any, slices: int = 1) -> None:
    """Without clones and with; and the fp64 loop to the error of the format."""
    expected, found = run(unmoved, case), run(moved, case)
    assert max(errors(found, expected).values()) < 1e-5
    sizes = sizes_of_errors(found, dense(moved, case, slices))
    assert all(0.02 < error < 0.10 for error in sizes.values()), sizes


def check_by_kernels() -> None:
    """Kernels of this package alone, in Triton's interpreter, against the specification.

    Rows and weights, clones among them, have its bits; the results are its to fp32 rounding.
    """
    for precision, way in (("fp8-rowwise", "symmetric_memory"), ("mxfp8", "collective")):
        with as_wide_as(precision) as fields:
            fields |= {"moe_echo_expert_dispatcher_type": way}
            case = case_of("hot", 2, DTYPE)
            expected, wanted = with_operands(of_all_sizes(cloned(2, DTYPE, 2, **fields)), case)
            layer = of_all_sizes(cloned(2, DTYPE, 2, **fields, moe_echo_grouped_gemm="triton"))
            with contextlib.ExitStack() as stack:
                stack.enter_context(triton_interpreter.mended())
                for module in (fp8, activation, permute):
                    stack.enter_context(mock.patch.object(module, "on_gpu", return_value=True))
                found, operands = with_operands(layer, case)
        assert [len(each) for each in (wanted, operands)] == [4, 4]
        first, *_ = zip(operands, wanted, strict=True)
        assert torch.equal(*(rows for rows, _ in first))
        for (_, ours), (_, theirs) in zip(operands, wanted, strict=True):
            assert torch.equal(ours, theirs)
        worst = errors(found, {name: tensor.double() for name, tensor in expected.items()})
        report(f"{precision}: kernels against the specification", worst)
        assert max(worst.values()) <= 2.0**-20


def with_operands(layer: EchoMoELayer, case: Any) -> tuple[dict, list[tuple[Tensor, Tensor]]]:
    """The results; rows in use, and bytes of home experts and clones in use, of each product."""
    seen: list[tuple[Tensor, Tensor]] = []
    in_torch, by_kernel = fp8_linear.scaled_product, kernels.scaled_product

    def note(rows: fp8.Quantised, of_experts: Tensor, ends: Tensor) -> None:
        in_use = torch.diff(ends, prepend=ends.new_zeros(1)) > 0
        assert in_use[-2:].any() or dist.get_rank() == 0  # where all tokens are routed to
        seen.append((rows.dequantised()[: int(ends[-1])].clone(), of_experts[in_use].clone()))

    def of_torch(rows: fp8.Quantised, weights: fp8.Quantised, ends: Tensor, *rest: Any) -> Tensor:
        both = (
            t.contiguous().view(torch.uint8).flatten(1) for t in (weights.values, weights.scales)
        )
        note(rows, torch.cat(tuple(both), 1), ends)
        return in_torch(rows, weights, ends, *rest)

    def of_kernel(words: Tensor, home: Tensor, slots: Tensor, ends: Tensor, *rest: Any) -> Tensor:
        form, width = rest[2], rest[0]
        rows = unpacked(words, form)
        given = rows.values.shape[1]
        scales = 4 * width if form.block is None else given // form.block * (width // form.lines)
        both = torch.cat((home, slots)).view(torch.uint8).squeeze(1)
        note(rows, both[:, : width * given + scales], ends)
        return by_kernel(words, home, slots, ends, *rest)

    with (
        mock.patch.object(fp8_linear, "scaled_product", of_torch),
        mock.patch.object(kernels, "scaled_product", of_kernel),
    ):
        return run(layer, case), seen


if __name__ == "__main__":
    triton_interpreter.patch_once()
    cpu_backend.enable(verbose=False)
    main(globals())
