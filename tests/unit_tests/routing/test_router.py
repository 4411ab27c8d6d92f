"""EchoRouter on one rank: the wheel's routing to the bit, and losses that are right."""

import copy
from collections.abc import Iterator
from typing import Any

import moe_cases
import pytest
import torch
from loss_reference import losses
from megatron.core.tensor_parallel.random import (
    checkpoint as megatron_checkpoint,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.moe_logging import (
    destroy_moe_metrics_tracker,
    get_moe_metrics_tracker,
)
from megatron.core.transformer.moe.moe_utils import (
    get_default_pg_collection,
    get_updated_expert_bias,
)
from megatron.core.transformer.moe.router import TopKRouter
from router_cases import (
    ALL_LOSSES,
    EXPERTS,
    GPIPE,
    LAST_STAGE,
    SCORES,
    TOPK,
    build,
    close,
    config,
    end_step,
    logged,
    loss_gradient,
    only,
    padding,
    set_scale,
    tokens,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.routing.losses import RouterLossSettings
from megatron_echo.routing.router import EchoRouter
from megatron_echo.step.load_metrics import load_metrics
from megatron_echo.testing import no_host_sync

pytestmark = pytest.mark.usefixtures("one_rank")

S, B = 12, 3
LENGTHS = (12, 5, 1)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    set_scale(1.0)
    destroy_moe_metrics_tracker()
    yield
    set_scale(1.0)
    destroy_moe_metrics_tracker()


def run(router: TopKRouter, hidden: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    hidden = hidden.clone().requires_grad_()
    router.weight.grad = None
    probs, routing_map = router(hidden, mask)
    probs.square().sum().backward()
    return {
        "probs": probs.detach(),
        "map": routing_map,
        "dw": router.weight.grad,
        "dx": hidden.grad,
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", SCORES)
def test_routes_like_megatron(mode: str, dtype: torch.dtype) -> None:
    """The same bits with every loss on, with gradients, without, and in evaluation."""
    fields = {**SCORES[mode], **ALL_LOSSES, "moe_router_dtype": None, "params_dtype": dtype}
    ours, theirs = (build(kind, config(**fields)) for kind in (EchoRouter, TopKRouter))
    hidden = tokens(S, B).to(dtype)
    for mask in (None, padding(S, LENGTHS)):
        for training, grad in ((True, True), (True, False), (False, True)):
            with torch.set_grad_enabled(grad):
                results = []
                for router in (ours, theirs):
                    router.train(training)
                    router.enable_expert_bias = router is ours and router.enable_expert_bias
                    results.append(router(hidden, mask))
            for actual, expected in zip(*results, strict=True):
                assert torch.equal(actual, expected)
                assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride())


@pytest.mark.parametrize("mode", SCORES)
def test_without_losses(mode: str) -> None:
    """No node, no slot, no collective: Megatron's own, gradients included."""
    fields = {**SCORES[mode], "moe_router_load_balancing_type": "none"}
    ours, theirs = (build(kind, config(**fields)) for kind in (EchoRouter, TopKRouter))
    assert ours.losses is None
    assert ours.config.finalize_model_grads_func is None
    actual, expected = (run(router, tokens(S, B)) for router in (ours, theirs))
    for name in expected:
        assert torch.equal(actual[name], expected[name])


@pytest.mark.parametrize("kind", ["aux", "seq", "global", "z"])
@pytest.mark.parametrize("mode", SCORES)
def test_agrees_with_megatron_where_that_is_right(mode: str, kind: str) -> None:
    """One rank, one microbatch, nothing padded: value and gradient, and the scale's effect."""
    fields = {**SCORES[mode], **only(kind)}
    ours, theirs = (build(router, config(**fields)) for router in (EchoRouter, TopKRouter))
    theirs.enable_expert_bias = False
    set_scale(0.25)
    actual, expected = (loss_gradient(router, tokens(S, B)) for router in (ours, theirs))
    close(actual, expected, 1e-6)
    for name, value in logged().items():
        assert value[0] > 0
        torch.testing.assert_close(value[0], 2 * _alone(fields, name), rtol=1e-6, atol=0)


def _alone(fields: dict[str, Any], name: str) -> Tensor:
    router = build(TopKRouter, config(**fields))
    router.enable_expert_bias = False
    loss_gradient(router, tokens(S, B))
    return logged()[name][0]


def explicit(router: TopKRouter, hidden: Tensor, valid: Tensor | None) -> Tensor:
    """All losses as a scalar in the graph, in fp64."""
    logits = router.gating(hidden)
    function = router.config.moe_router_score_function
    found = losses(logits, router.topk, function, valid)  # one microbatch is the whole batch
    return (1e-2 + 3e-2) * found["microbatch"] + 2e-2 * found["sequence"] + 1e-3 * found["z"]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("mode", SCORES)
def test_injected_is_explicit(mode: str, lengths: tuple[int, ...] | None) -> None:
    """All terms and a main loss, fp64: 1e-12."""
    router = build(EchoRouter, config(**SCORES[mode], **ALL_LOSSES))
    router.losses.score_dtype = torch.float64  # Megatron computes scores in fp32, whatever it gets
    router.expert_bias, mask = None, None if lengths is None else padding(S, lengths)
    hidden, scale = tokens(S, B).requires_grad_(), 0.5
    set_scale(scale)
    router(hidden, mask)[0].double().square().sum().backward()
    actual = router.weight.grad, hidden.grad
    router.weight.grad = hidden.grad = None
    router.losses.has_balance_loss = router.losses.has_z_loss = False
    router.losses.settings = RouterLossSettings({})
    main = router(hidden, mask)[0].double().square().sum()
    (main + scale * explicit(router, hidden, None if mask is None else ~mask)).backward()
    for injected, expected in zip(actual, (router.weight.grad, hidden.grad), strict=True):
        close(injected, expected, 1e-12)


@pytest.mark.parametrize("mode", ["softmax", "sigmoid"])
def test_compat_is_the_wheel(mode: str) -> None:
    """``--moe-echo-aux-mcore-compat``: values, gradients and logged losses, bit for bit."""
    fields = {**SCORES[mode], **ALL_LOSSES}
    made = config(**fields, moe_echo_aux_mcore_compat=True)
    found = []
    for router in (build(EchoRouter, made), build(TopKRouter, config(**fields))):
        results = [run(router, tokens(S, B, seed), padding(S, LENGTHS)) for seed in range(2)]
        found.append((*(t for result in results for t in result.values()), *logged().values()))
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)


def test_true_lengths_of_sequences() -> None:
    """Megatron divides by the mean length (D2); we take each sequence's own."""
    mask, hidden = padding(S, LENGTHS), tokens(S, B)
    ours, theirs = (build(k, config(**only("seq"))) for k in (EchoRouter, TopKRouter))
    alone = []
    for b, length in enumerate(LENGTHS):
        single = build(TopKRouter, config(**only("seq")))
        alone.append(loss_gradient(single, hidden[:length, b : b + 1]))
    expected = torch.stack(alone).mean(0)
    logged()
    close(loss_gradient(ours, hidden, mask), expected, 1e-6)
    value = logged()["seq_load_balancing_loss"][0]
    wrong = loss_gradient(theirs, hidden, mask)
    wrong_value = logged()["seq_load_balancing_loss"][0]
    assert (wrong - expected).norm() > 0.1 * expected.norm()
    assert abs(wrong_value - value) > 0.02 * value


def test_bias_counts_with_padding() -> None:
    """Megatron masks experts in place of tokens (D4); we count each valid token."""
    fields = SCORES["sigmoid_scaled"]
    ours, theirs = (build(kind, config(**fields)) for kind in (EchoRouter, TopKRouter))
    mask = padding(S, LENGTHS)
    with pytest.raises(RuntimeError, match="size of tensor"):
        theirs(tokens(S, B), mask)
    routing_map = ours(tokens(S, B), mask)[1]
    expected = routing_map[~mask.view(-1)].sum(0)
    assert torch.equal(ours.local_tokens_per_expert, expected)
    square = padding(EXPERTS, (3,))  # as many tokens as experts: no error, wrong counts
    theirs.local_tokens_per_expert.zero_()
    routing_map = theirs(tokens(EXPERTS, 1), square)[1]
    right = routing_map[~square.view(-1)].sum(0)
    assert not torch.equal(theirs.local_tokens_per_expert, right.float())
    ours.local_tokens_per_expert.zero_()
    ours(tokens(EXPERTS, 1), square)
    assert torch.equal(ours.local_tokens_per_expert, right)


def test_padding_changes_nothing() -> None:
    longer = torch.cat((tokens(S, B), 5 * tokens(4, B, 9)))
    for kind in ("aux", "seq", "global", "z"):
        made = [build(EchoRouter, config(**only(kind))) for _ in range(2)]
        expected = loss_gradient(made[0], longer[:S])
        close(loss_gradient(made[1], longer, padding(S + 4, (S,) * B)), expected, 1e-6)
        nothing = loss_gradient(made[1], longer, padding(S + 4, (0,) * B))
        assert torch.equal(nothing, torch.zeros_like(nothing))


@pytest.mark.parametrize("kind", ["aux", "seq", "global", "z"])
def test_tokens_weigh_with_per_token_loss(kind: str) -> None:
    """What Megatron divides by the tokens of the step is that many times the mean."""
    mask = padding(S, (S, S, S))
    plain = build(EchoRouter, config(**only(kind)))
    per_token = build(EchoRouter, config(**only(kind), calculate_per_token_loss=True))
    hidden = tokens(S, B)
    close(loss_gradient(per_token, hidden), S * B * loss_gradient(plain, hidden), 1e-6)
    close(loss_gradient(per_token, hidden, mask), S * B * loss_gradient(plain, hidden), 1e-6)


@pytest.mark.parametrize("counted", ["unbiased", "assigned"])
def test_which_choices_count(counted: str) -> None:
    fields = {**SCORES["sigmoid_groups"], **only("aux"), "moe_echo_aux_counts": counted}
    router = build(EchoRouter, config(**fields))
    hidden = tokens(S, B)
    routing_map = router(hidden)[1]
    unbiased = torch.zeros_like(routing_map).scatter_(
        1, router.gating(hidden).view(S * B, -1).topk(TOPK).indices, True
    )
    assert not torch.equal(unbiased, routing_map)
    expected = unbiased if counted == "unbiased" else routing_map
    end_step(router)
    assert torch.equal(router.losses.exchange.last_step, expected.sum(0)[None])


class Block(torch.nn.Module):
    """A router and something of its output."""

    def __init__(self, router: TopKRouter) -> None:
        super().__init__()
        self.router = router

    def forward(self, hidden: Tensor) -> Tensor:
        return self.router(hidden.tanh())[0].square().sum()


def recomputed(how: str, module: Block, *args: Tensor) -> Tensor:
    if how == "none":
        return module(*args)
    if how == "megatron":
        return megatron_checkpoint(module, False, *args)
    return torch_checkpoint(module, *args, use_reentrant=how == "reentrant")


RECOMPUTE = ["megatron", "reentrant", "non-reentrant"]


@pytest.mark.parametrize("order", [GPIPE, LAST_STAGE, "F F B F B F B B"])
@pytest.mark.parametrize("how", RECOMPUTE)
def test_recomputation(how: str, order: str) -> None:
    """Counts, losses and gradients of the same bits, whatever is recomputed."""
    found = {}
    for name in ("none", how):
        made = config(**ALL_LOSSES, **SCORES["sigmoid_scaled"])
        routers = [build(EchoRouter, made, layer) for layer in (1, 2)]
        waiting, index = [], 0
        for word in order.split():
            if word == "F":
                hidden = tokens(S, B, index).requires_grad_()
                waiting.append(sum(recomputed(name, Block(router), hidden) for router in routers))
                index += 1
            else:
                waiting.pop(0).backward()
        end_step(routers[0])
        found[name] = [
            *(router.weight.grad for router in routers),
            *(router.local_tokens_per_expert for router in routers),
            routers[0].losses.exchange.last_step,
            *logged().values(),
        ]
    for actual, expected in zip(found[how], found["none"], strict=True):
        assert expected.abs().sum() > 0
        assert torch.equal(actual, expected)


ORDERS = {"gpipe": GPIPE, "last in first out": "F F F L L L", "interleaved": "F F B F L B"}


def step_of(made: Any, order: str, ways: list[str], reference: str | None = None) -> list[Tensor]:
    """A step of two routers, and what it leaves.

    Args:
        made: the configuration.
        order: forward (F) and backward passes, of the oldest (B) or newest (L) microbatch.
        ways: how each microbatch is recomputed.
        reference: how a train-mode pass without gradients runs before each of these; None: none.
    """
    routers = [build(EchoRouter, made, layer) for layer in (1, 2)]
    waiting, index = [], 0
    for word in order.split():
        if reference is not None:
            with torch.no_grad():
                hidden = tokens(S, B, 90 + index).requires_grad_()
                for router in routers:
                    recomputed(reference, Block(router), hidden)
        if word == "F":
            hidden = tokens(S, B, index).requires_grad_()
            blocks = [Block(router) for router in routers]
            waiting.append(sum(recomputed(ways[index], block, hidden) for block in blocks))
            index += 1
        else:
            waiting.pop(0 if word == "B" else -1).backward()
    exchange = routers[0].losses.exchange
    exchange.end_step()
    counters = [router.local_tokens_per_expert for router in routers]
    weights = [router.weight.grad for router in routers]
    return [*weights, *counters, exchange.last_step, *logged().values()]


@pytest.mark.parametrize("reference", ["none", *RECOMPUTE])
@pytest.mark.parametrize("way", ["none", *RECOMPUTE])
def test_a_pass_that_trains_nothing_leaves_no_trace(way: str, reference: str) -> None:
    """Train mode under ``no_grad``, before and between the passes of a step: the same bits."""
    for order in ORDERS.values():
        found = [
            step_of(config(**ALL_LOSSES, **SCORES["sigmoid_scaled"]), order, [way] * 4, extra)
            for extra in (None, reference)
        ]
        for actual, expected in zip(*found, strict=True):
            assert expected.abs().sum() > 0
            assert torch.equal(actual, expected), order


@pytest.mark.parametrize("order", ORDERS)
def test_only_some_microbatches_are_recomputed(order: str) -> None:
    """In any order of backward passes each recomputation is its own first pass."""
    found = [
        step_of(config(**ALL_LOSSES, **SCORES["sigmoid_scaled"]), ORDERS[order], ways)
        for ways in (["none"] * 4, ["megatron", "none", "non-reentrant", "reentrant"])
    ]
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)


def test_a_microbatch_without_a_backward_pass() -> None:
    """Its checkpoints are gone with its output: as if it had not been."""
    found = []
    for given_up in (False, True):
        router = build(EchoRouter, config(**ALL_LOSSES))
        if given_up:
            recomputed("megatron", Block(router), tokens(S, B, 7).requires_grad_())
        recomputed("megatron", Block(router), tokens(S, B, 1).requires_grad_()).backward()
        end_step(router)
        found.append([router.weight.grad, router.losses.exchange.last_step, *logged().values()])
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)


def test_counters_are_exact_in_bf16() -> None:
    """A model in bf16 makes buffers bf16, which end at 256: not the counter."""
    made = config(**SCORES["sigmoid_scaled"], params_dtype=torch.bfloat16, moe_router_dtype="fp32")
    router = build(EchoRouter, made).bfloat16()
    total = torch.zeros(EXPERTS, dtype=torch.int64)
    for index in range(3):
        total += router(tokens(301, B, index).bfloat16())[1].sum(0)
    assert total.max() > 256
    assert torch.equal(router.local_tokens_per_expert.long(), total)
    bias = get_updated_expert_bias(router.local_tokens_per_expert[None], router.expert_bias, 1.0)
    steps = (bias - router.expert_bias)[0].round()
    assert torch.equal(steps, torch.sign(total.double().mean() - total).float())
    assert set(router.state_dict()) == set(
        build(TopKRouter, config(**SCORES["sigmoid"])).state_dict()
    ) | {"expert_bias"}


@pytest.mark.parametrize("kind", ["aux", "seq", "global", "z"])
@pytest.mark.parametrize("way", ["none", "megatron"])
def test_losses_of_frozen_routers_are_logged(way: str, kind: str) -> None:
    """Where the logits need no gradient no backward pass comes by: the same values."""
    for mask in (None, padding(S, LENGTHS)):
        found = []
        for frozen in (False, True):
            made, losses = config(**only(kind)), []
            routers = [build(EchoRouter, made, layer) for layer in (1, 2)]
            routers[1].weight.requires_grad_(not frozen)
            for index in range(2):
                weight = torch.ones((), dtype=torch.float64, requires_grad=True)
                for router in routers:
                    block, args = Scaled(router, mask), (weight, tokens(S, B, index))
                    losses.append(recomputed(way, block, *args))
            torch.stack(losses).sum().backward()
            end_step(routers[0])
            end_step(routers[0])  # nothing is recorded twice
            found.append(logged())
        for name, values in found[0].items():
            assert (values > 0).all()
            torch.testing.assert_close(found[1][name], values, rtol=1e-6, atol=0)


class Scaled(Block):
    """The output needs a gradient, the router's input does not."""

    def __init__(self, router: TopKRouter, mask: Tensor | None) -> None:
        super().__init__(router)
        self.mask = mask

    def forward(self, weight: Tensor, hidden: Tensor) -> Tensor:
        return weight * self.router(hidden, self.mask)[0].sum()


def test_megatron_counts_twice_under_torchs_recomputation() -> None:
    counted = []
    for how in ("none", "non-reentrant"):
        router = build(TopKRouter, config(**SCORES["sigmoid_scaled"]))
        recomputed(how, Block(router), tokens(S, B).requires_grad_()).backward()
        counted.append(router.local_tokens_per_expert)
    assert torch.equal(counted[1], 2 * counted[0])


def test_evaluation_in_between() -> None:
    """Nothing is counted, recorded or shifted."""
    found = []
    for evaluates in (False, True):
        router = build(EchoRouter, config(**ALL_LOSSES))
        first = recomputed("megatron", Block(router), tokens(S, B, 1).requires_grad_())
        if evaluates:
            router.eval()
            router(tokens(S, B, 7))
            with torch.no_grad():
                router(tokens(S, B, 8))
            router.train()
        second = recomputed("megatron", Block(router), tokens(S, B, 2).requires_grad_())
        first.backward()
        second.backward()
        found.append((router.weight.grad, *logged().values()))
    for actual, expected in zip(*found, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("how", ["none", "megatron"])
def test_repeated_mtp_layer(how: str) -> None:
    """Two calls a microbatch, each half as strong, backward in the opposite order."""
    made = config(**only("seq"), mtp_num_layers=2, mtp_use_repeated_layer=True)
    router = EchoRouter(made, get_default_pg_collection(), is_mtp_layer=True)
    router.set_layer_number(1)
    expected = []
    for microbatch in range(2):
        hidden = tokens(S, B, microbatch)
        for part in (hidden, hidden.flip(-1)):
            single = build(EchoRouter, config(**only("seq")))
            single.weight.data.copy_(router.weight)
            expected.append(loss_gradient(single, part) / 2)
    losses = []
    for microbatch in range(2):
        hidden = tokens(S, B, microbatch).requires_grad_()
        first = recomputed(how, Routed(router), hidden)
        second = recomputed(how, Routed(router), first.flip(-1))
        losses.append(second.sum() * 0)
    logged()
    for loss in losses:
        loss.backward()
    close(router.weight.grad, sum(expected), 1e-6)
    values = logged()["seq_load_balancing_loss"]
    assert values[:2].sum() == 0
    assert values[2] > 0


@pytest.mark.parametrize("way", ["none", "megatron"])
def test_z_loss_of_a_repeated_mtp_layer(way: str) -> None:
    """Megatron trains it once a repetition and logs it once (D5); ours trains as it logs."""
    made = config(**only("z"), mtp_num_layers=2, mtp_use_repeated_layer=True)
    grads, values = [], []
    for kind in (EchoRouter, TopKRouter):
        router = kind(made, get_default_pg_collection(), is_mtp_layer=True)
        router.set_layer_number(1)
        router.weight.data.copy_(build(TopKRouter, config()).weight)
        hidden = tokens(S, B).requires_grad_()

        def twice(x: Tensor, router: TopKRouter = router) -> Tensor:
            return sum((0 * router(part)[0]).sum() for part in (x, x.flip(-1)))

        (
            megatron_checkpoint(twice, False, hidden) if way == "megatron" else twice(hidden)
        ).backward()
        grads.append(router.weight.grad)
        values.append(logged()["z_loss"])
    close(grads[1], 2 * grads[0], 1e-6)
    close(values[0], values[1], 1e-6)


class Routed(Block):
    """Hands the hidden states on, with an edge to the router."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 0 * self.router(hidden)[0].sum()


def test_scale_of_the_main_loss() -> None:
    router = build(EchoRouter, config(**ALL_LOSSES))
    once = loss_gradient(router, tokens(S, B))
    set_scale(1024.0)
    assert torch.equal(
        loss_gradient(build(EchoRouter, config(**ALL_LOSSES)), tokens(S, B)), 1024 * once
    )


@pytest.mark.parametrize("mode", SCORES)
def test_no_host_sync(mode: str) -> None:
    router = build(EchoRouter, config(**SCORES[mode], **ALL_LOSSES))
    with no_host_sync():
        for mask in (None, padding(S, LENGTHS)):
            run(router, tokens(S, B), mask)
        end_step(router)


@pytest.mark.parametrize("mode", ["pre_softmax", "sigmoid", "softmax"])
def test_saves_one_tensor_of_all_experts(mode: str) -> None:
    router = build(EchoRouter, config(**SCORES[mode], **ALL_LOSSES))
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == S * B * EXPERTS and tensor.is_floating_point():
            saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        probs, _ = router(tokens(S, B).requires_grad_())
    assert len(saved) == 1
    assert probs.requires_grad


class UsersRouter(TopKRouter):
    """Not Megatron's own class: the layer leaves it where the user put it."""


def test_in_the_moe_layer() -> None:
    """Chosen through ``MoESubmodules``: the same output, gradients of the losses, no host read."""
    fields = {**ALL_LOSSES, "moe_router_dtype": "fp32"}
    outputs, grads = [], []
    hidden = torch.randn(S, B, moe_cases.HIDDEN, generator=torch.Generator().manual_seed(0))
    for kind in (UsersRouter, EchoRouter):
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        made = moe_cases.layer_config(1, TOPK, torch.float32, **fields)
        layer = EchoMoELayer(made, MoESubmodules(None, router=kind))
        layer.set_layer_number(1)
        assert type(layer.router) is kind
        with no_host_sync():
            output, _ = layer(hidden)
            output.square().sum().backward()
        outputs.append(output)
        grads.append(layer.router.weight.grad)
    assert torch.equal(*outputs)
    close(grads[1], grads[0], 1e-5)


def test_step_end() -> None:
    """Megatron's end of a step begins the next one, also for a copied configuration."""
    calls = []
    made = config(**ALL_LOSSES)
    made.finalize_model_grads_func = lambda *args: calls.append(args)
    router = build(EchoRouter, made)
    other = build(EchoRouter, copy.deepcopy(made), layer=2)
    assert other.losses.exchange is router.losses.exchange
    for each in (router, other):
        loss_gradient(each, tokens(S, B))
    made.finalize_model_grads_func("model")
    assert calls == [("model",)]
    assert router.losses.counts.seen() == []
    assert router.losses.exchange.last_step.sum() == 2 * S * B * TOPK


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_echo_aux_count_source": "previous_step"}, "batch-wise loss. Use"),
        ({**only("seq"), "moe_echo_aux_count_source": "late"}, "batch-wise loss. Use"),
        ({**only("seq"), "moe_echo_aux_count_source": "cumulative"}, "batch-wise loss. Use"),
        ({**only("global"), "moe_echo_aux_count_source": "soon"}, "unknown. Use"),
        ({**only("seq"), "moe_echo_aux_counts": "dropped"}, "unknown. Use"),
        (only("seq", -1.0), "no strength. Use"),
        (only("z", float("nan")), "no strength. Use"),
        (
            {**only("seq"), "moe_echo_aux_mcore_compat": True, "moe_echo_aux_counts": "assigned"},
            "Leave one out",
        ),
    ],
)
def test_settings_without_meaning(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(EchoRouter, config(**fields))


def test_skew_combines() -> None:
    made = config(**ALL_LOSSES)
    made.moe_echo_force_skew = 4.0
    ours, theirs = build(EchoRouter, made), build(TopKRouter, made)
    theirs.enable_expert_bias = False
    actual = ours(tokens(S, B))
    gating = theirs.gating
    theirs.gating = lambda hidden: gating(hidden) + ours._skew_bias
    assert torch.equal(actual[0], theirs(tokens(S, B))[0])
    assert ours.losses is not None
    loads = actual[1].sum(0)
    assert loads.max() > 2 * loads.double().mean()


def test_load_metrics() -> None:
    even, one = torch.full((4,), 5), torch.tensor([0, 20, 0, 0])
    found = load_metrics(torch.stack((even, one)))
    expected = {
        "expert_overload": [1.0, 4.0],
        "expert_entropy": [1.0, 0.0],
        "dead_experts": [0.0, 3.0],
    }
    for name, values in expected.items():
        torch.testing.assert_close(found[name], torch.tensor(values, dtype=torch.float64))


def test_tracker_is_megatrons() -> None:
    router = build(EchoRouter, config(**ALL_LOSSES))
    loss_gradient(router, tokens(S, B))
    assert set(get_moe_metrics_tracker().metrics) == {
        "load_balancing_loss",
        "seq_load_balancing_loss",
        "global_load_balancing_loss",
        "z_loss",
    }
