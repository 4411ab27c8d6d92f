"""A step ends once, before the optimizer, whoever calls and replaces what, and whenever."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import moe_cases
import pytest
import torch
import torch.optim.optimizer as torch_optimizer
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from torch import Tensor, nn
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from megatron_echo.dispatch import MoEOverflowError
from megatron_echo.moe_layer import EchoMoELayer
from megatron_echo.planner import plan_clones
from megatron_echo.record.statistics import StepStatistics
from megatron_echo.step.self_check import SelfCheck
from megatron_echo.step.step_end import StepEnd

pytestmark = pytest.mark.usefixtures("single_rank")
BATCH_WISE = {
    "moe_router_load_balancing_type": "global_aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_router_pre_softmax": False,
}


def nothing(*_: Any) -> None:
    """What a script may put in the place of Megatron's function."""


class Model(nn.Module):
    """Two MoE layers, and the configuration that Megatron's models carry."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        self.config = moe_cases.layer_config(1, 2, torch.float32, num_layers=2, **fields)
        self.config.finalize_model_grads_func = nothing
        self.layers = nn.ModuleList(EchoMoELayer(self.config) for _ in range(2))
        for number, layer in enumerate(self.layers, start=1):
            layer.set_layer_number(number)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden)[0]
        return hidden.square().mean()

    @property
    def step_end(self) -> StepEnd:
        return StepEnd.of(self.config)


def tokens(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 2, moe_cases.HIDDEN, generator=generator)


def ends(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at each end of a step of this model."""
    found: list[int] = []
    check = model.step_end.overflow.check

    def counted() -> None:
        found.append(len(found))
        check()

    monkeypatch.setattr(model.step_end.overflow, "check", counted)
    return found


def optimizers(model: nn.Module, number: int = 1) -> list[SGD]:
    parameters = list(model.parameters())
    return [SGD(parameters[index::number], lr=1e-3) for index in range(number)]


def train(model: Model, stepping: list[SGD], step: int = 0, finalizes: int = 1) -> None:
    """A step of two microbatches in a loop that is not Megatron's."""
    for index in range(2):
        model(tokens(2 * step + index)).backward()
    for _ in range(finalizes):
        model.config.finalize_model_grads_func([model])
    for optimizer in stepping:
        optimizer.step()
        optimizer.zero_grad()


def replace(model: Model) -> None:
    model.config.finalize_model_grads_func = nothing


def wrap(model: Model) -> None:
    ours = model.config.finalize_model_grads_func
    model.config.finalize_model_grads_func = lambda *args: ours(*args)


WAYS: dict[str, Callable[[Model], None]] = {
    "ours": lambda model: None,
    "replaced": replace,
    "wrapped": wrap,
}


@pytest.mark.parametrize("finalizes", [0, 1, 2])
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_ends_once(
    way: str, number: int, finalizes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With several optimizers in one, and the function called never, once or twice."""
    model = Model(**BATCH_WISE)
    WAYS[way](model)
    found, stepping = ends(model, monkeypatch), optimizers(model, number)
    for step in range(3):
        train(model, stepping, step, finalizes)
        assert len(found) == step + 1
        assert model.step_end.exchange is not None
        assert model.step_end.exchange.layers[0].seen() == []


def test_replaced_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, another's, ours in another's: the same gradients and losses as with ours alone."""
    results = []
    for changes in ({}, {1: replace, 3: wrap}):
        destroy_moe_metrics_tracker()
        model = Model(**BATCH_WISE)
        ours = model.config.finalize_model_grads_func
        found, stepping = ends(model, monkeypatch), optimizers(model)
        for step in range(4):
            if step in changes:
                model.config.finalize_model_grads_func = ours
                changes[step](model)
            train(model, stepping, step)
        assert len(found) == 4
        results.append([parameter.detach().clone() for parameter in model.parameters()])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("way", WAYS)
def test_an_overflow_stops_any_loop_before_the_optimizer(way: str) -> None:
    """Also in the second step, and after one that failed; evaluation and others' steps do not."""
    model = Model(moe_received_token_capacity=0.6)
    WAYS[way](model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    other = nn.Linear(2, 2)
    for step in range(2):
        with pytest.raises(MoEOverflowError, match="--moe-received-token-capacity 1"):
            train(model, optimizers(model), step)
        for parameter, expected in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter, expected)
        other(torch.ones(2)).sum().backward()
        optimizers(other)[0].step()


def test_another_models_optimizer_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn with ours, more often, and after a pass of ours that trains nothing."""
    model, other = Model(), Model()
    replace(model)
    replace(other)
    found, others = ends(model, monkeypatch), ends(other, monkeypatch)
    for step in range(2):
        train(other, optimizers(other), step)
        with torch.no_grad():
            model(tokens(9))
        train(other, optimizers(other), step)
        train(model, optimizers(model), step)
    assert (len(found), len(others)) == (2, 4)


class Dense(nn.Module):
    """A pipeline stage without MoE layers."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).sum()


@pytest.mark.parametrize("way", WAYS)
def test_a_stage_without_moe_layers_ends_as_often(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rank takes part in every check, and in none that the others do not make."""
    model: Any = Dense(moe_cases.layer_config(1, 2, torch.float32))
    model.config.finalize_model_grads_func = nothing
    model.step_end = StepEnd.of(model.config)
    WAYS[way](model)
    found, stepping = ends(model, monkeypatch), optimizers(model, 2)
    for optimizer in stepping:  # Megatron's way of making the state before it loads one
        optimizer.step()
    assert found == []
    for step in range(3):
        model(torch.ones(2)).backward()
        with torch.no_grad():
            model(torch.ones(2))
        model.config.finalize_model_grads_func([model])
        for optimizer in stepping * 2:
            optimizer.step()
        assert len(found) == step + 1


def test_replayed_steps_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay calls no layer: a step is over when an optimizer steps that has since the last."""
    model = Model(cuda_graph_impl="full_iteration", cuda_graph_warmup_steps=1, **BATCH_WISE)
    found, stepping = ends(model, monkeypatch), optimizers(model, 2)
    stepping[0].step()
    assert found == []
    exchange = model.step_end.exchange
    assert exchange is not None
    for step in range(4):
        if step == 0:
            train(model, stepping, step)
            counts = exchange.last_step
        else:
            for optimizer in stepping:
                optimizer.step()
        assert len(found) == step + 1
        assert torch.equal(exchange.last_step, counts)


def test_the_hooks_keep_no_model_alive() -> None:
    gc.collect()  # models of other tests
    hooks = len(torch_optimizer._global_optimizer_pre_hooks)
    model = Model(**BATCH_WISE)
    train(model, optimizers(model))
    alive = weakref.ref(model)
    assert len(torch_optimizer._global_optimizer_pre_hooks) == hooks + 1
    del model
    gc.collect()
    assert alive() is None
    assert len(torch_optimizer._global_optimizer_pre_hooks) <= hooks


def calls_of(model: Model) -> int:
    found = model.step_end.statistics._local.end_step()
    return 0 if found is None else int(found[1])


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_a_pass_that_trains_nothing_is_not_watched(is_recomputed: bool) -> None:
    """Train mode under ``no_grad``: no overflow, no statistics, no captured routing."""
    model = Model(moe_received_token_capacity=0.6, moe_echo_overflow="drop")
    calls = []
    model.step_end.record_routing = lambda layer, *_: calls.append(layer)  # type: ignore
    expected = model.eval()(tokens())
    model.train()
    with torch.no_grad():
        assert torch.equal(model(tokens()), expected)  # nothing is dropped
    model.step_end.overflow.check()
    assert (model.step_end.overflow.dropped, calls) == (0, [])
    assert calls_of(model) == 0
    hidden = tokens().requires_grad_()
    (checkpoint(model, hidden, use_reentrant=False) if is_recomputed else model(hidden)).backward()
    assert calls == [1, 2]
    assert calls_of(model) == 2


def test_statistics_without_clones() -> None:
    """The same numbers as from plans that make no clones."""
    generator = torch.Generator().manual_seed(0)
    found = []
    group: Any = torch.distributed.group.WORLD
    for has_plan in (True, False):
        statistics = StepStatistics()
        for step in range(2):
            statistics.begin_step()
            for _ in range(3):
                counts = torch.randint(0, 9, (1, 4), generator=generator.manual_seed(step))
                if has_plan:
                    statistics.record(plan_clones(counts, 0))
                else:
                    statistics.record_local(counts.view(1, 1, 4).sum((0, 2)), group)
            statistics.end_step()
        found.append(statistics.read())
    assert found[0] == found[1]
    assert found[1]["layer_calls"] == 3
    statistics.begin_step()
    statistics.end_step()
    assert statistics.read() == {"layer_calls": 0}  # no overload of 0.0


def record(check: SelfCheck) -> None:
    check._seen = torch.zeros(2, dtype=torch.float64)


def test_the_self_check_takes_layers_that_are_called() -> None:
    """One model was built and dropped, two run in turn on one configuration: all get theirs."""
    check = SelfCheck(1)
    dropped, first, second = ([check.register() for _ in range(3)] for _ in range(3))
    assert dropped == [0, 1, 2]
    for models in ([first], [first, second]):
        check = SelfCheck(2)
        taken: list[int] = []
        for step in range(24):
            for _ in range(2):
                for layer in models[step // 2 % len(models)]:
                    if check.is_due(layer):
                        taken.append(layer)
                        record(check)
            error = check.check()
            assert (error, check.ranks) == ((0.0, 1) if step % 2 == 0 else (None, None))
        assert set(taken) == {layer for model in models for layer in model}


def test_the_self_check_says_when_it_compared_nothing() -> None:
    check = SelfCheck(1)
    assert check.check() is None
    assert check.ranks == 0
