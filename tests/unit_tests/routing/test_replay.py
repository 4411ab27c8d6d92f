"""Replayed routing: which tokens of a batch are whose, Megatron's ``RouterReplay``, bad files."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.tensor_parallel.random import checkpoint as megatron_checkpoint
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from router_cases import ALL_LOSSES, EXPERTS, TOPK, build, config, end_step, tokens
from torch import Tensor
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from megatron_echo.call_roles import Role
from megatron_echo.record.token_layout import TokenLayout
from megatron_echo.routing import replay
from megatron_echo.routing.replay import ReplayedRouting
from megatron_echo.routing.router import EchoRouter
from megatron_echo.testing import no_host_sync

pytestmark = pytest.mark.usefixtures("one_rank")

S, B = 6, 2
ONE_RANK = TokenLayout(0, 1, 0, 1, 0, 1, B)


@pytest.fixture
def replays() -> Iterator[type[RouterReplay]]:
    RouterReplay.clear_global_router_replay_instances()
    yield RouterReplay
    RouterReplay.clear_global_router_replay_instances()


@settings(max_examples=50, deadline=None)
@given(*(st.integers(1, most) for most in (3, 3, 2, 3, 2, 3)))
def test_every_token_has_one_rank(
    data: int, context: int, sequence: int, batch: int, microbatches: int, part: int
) -> None:
    """Each token of a step is in one place of one rank; a rank has whole parts of sequences."""
    length = 2 * context * sequence * part
    seen = np.zeros(microbatches * data * batch * length, dtype=int)
    for d, c, p in np.ndindex(data, context, sequence):
        layout = TokenLayout(d, data, c, context, p, sequence, batch)
        for microbatch in range(microbatches):
            places = layout.positions(length // context // sequence * batch, microbatch)
            seen[places] += 1
            first, second = places[:batch] // length, places[batch : 2 * batch] // length
            assert np.array_equal(first, second)
            assert (np.diff(first) == 1).all()
    assert (seen == 1).all()


def test_sequences_of_an_odd_length() -> None:
    """Without context parallelism nothing has to be divisible."""
    assert TokenLayout(0, 2, 0, 1, 0, 1, 1).positions(7, 1).tolist() == list(range(14, 21))


def test_parts_of_a_sequence_are_megatrons() -> None:
    """Rank 0 of two has the first and the last quarter, which sequence parallelism halves."""
    assert TokenLayout(0, 1, 0, 2, 0, 1, 1).positions(4, 0).tolist() == [0, 1, 6, 7]
    assert TokenLayout(0, 1, 1, 2, 1, 2, 1).positions(2, 1).tolist() == [12, 13]


@pytest.mark.parametrize("has_losses", [True, False])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_recorded_and_replayed(replays: Any, has_losses: bool, score: str) -> None:
    """The same bits with the same weights; the recorded experts with others."""
    fields: dict[str, Any] = {"moe_router_score_function": score}
    if has_losses:
        fields |= ALL_LOSSES
    router = build(EchoRouter, config(moe_enable_routing_replay=True, **fields))
    hidden = tokens(S, B).requires_grad_()
    replays.set_global_router_replay_action(RouterReplayAction.RECORD)
    probs, chosen = router(hidden)
    (grad,) = torch.autograd.grad(probs.square().sum(), hidden)
    replays.set_replay_data(replays.get_recorded_data())
    replays.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    # It asks for the device that the ids are on.
    with no_host_sync("raise", allow=["router_replay.py:get_replay_topk"]):
        again, chosen_again = router(hidden)
        (grad_again,) = torch.autograd.grad(again.square().sum(), hidden)
    assert chosen_again.equal(chosen)
    assert again.equal(probs)
    assert grad_again.equal(grad)
    with torch.no_grad():
        router.weight.neg_()
    others, same = router(hidden)
    assert same.equal(chosen)
    assert not others.equal(probs)
    if has_losses:
        end_step(router)


@pytest.mark.parametrize("again", ["megatron", "torch"])
def test_recomputation_with_microbatches_in_flight(replays: Any, again: str) -> None:
    """Each recomputation takes the ids of its own microbatch, not of the latest."""
    router = build(EchoRouter, config(moe_enable_routing_replay=True, **ALL_LOSSES))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.rand(S * B, EXPERTS, generator=generator).topk(TOPK).indices for _ in range(2)]
    seen: list[Tensor] = []
    choose = router.router_replay.get_replay_topk

    def watched(*arguments: Any) -> Any:
        found = choose(*arguments)
        seen.append(found[1])
        return found

    router.router_replay.get_replay_topk = watched
    replays.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    losses = []
    for mine in ids:
        replays.set_replay_data([mine])
        hidden = tokens(S, B).requires_grad_()
        run = megatron_checkpoint if again == "megatron" else torch_checkpoint
        arguments = (router, False, hidden) if again == "megatron" else (router, hidden)
        extra = {} if again == "megatron" else {"use_reentrant": False}
        losses.append(run(*arguments, **extra)[0].square().sum())
    for loss in losses:
        loss.backward()
    assert [found.tolist() for found in seen] == [ids[whose].tolist() for whose in (0, 1, 0, 1)]
    assert router.router_replay.router_replay_action is RouterReplayAction.REPLAY_FORWARD
    end_step(router)


def at_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's loop counts those that are done."""
    monkeypatch.setattr(replay, "training_args", lambda: SimpleNamespace(curr_iteration=step - 1))


def reader(folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> ReplayedRouting:
    monkeypatch.setattr(TokenLayout, "of_this_rank", lambda _: ONE_RANK)
    at_step(1, monkeypatch)
    return ReplayedRouting(config(moe_echo_replay_routing=str(folder), num_layers=2, **fields))


def write(folder: Path, ids: np.ndarray, step: int = 1) -> None:
    np.savez(folder / f"step-{step:08d}.npz", ids=ids)


def test_calls_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward passes and recomputations each, by layer; a new step begins at 0.

    Steps are Megatron's: a run that was resumed does not begin with the first.
    """
    ids = np.arange(4 * S * 2 * TOPK).reshape(4 * S, 2, TOPK) % EXPERTS
    write(tmp_path, ids, 3)
    write(tmp_path, ids[::-1].copy(), 4)
    found = reader(tmp_path, monkeypatch)
    for number, step in ((3, ids), (4, ids[::-1])):
        at_step(number, monkeypatch)
        samples = step.reshape(4, S, 2, TOPK).swapaxes(0, 1)
        for role in (Role.FIRST_PASS, Role.RECOMPUTED):
            for layer, microbatch in np.ndindex(2, 2):
                expected = samples[:, 2 * microbatch : 2 * microbatch + 2, layer].reshape(-1, TOPK)
                assert found.ids(layer + 1, role, S * B).tolist() == expected.tolist()
        found.end_step()


@pytest.mark.parametrize(
    ("shape", "highest", "words"),
    [
        ((2 * S, 3, TOPK), 1, r"has ids of shape \(12, 3, .*but the model has 2 MoE layers"),
        ((2 * S, 2, TOPK + 1), 1, f"holds {TOPK + 1} experts a token"),
        ((2 * S, 2, TOPK), EXPERTS + 1, f"numbered 0 to {EXPERTS + 1}, but the model chooses"),
        ((S, 2, TOPK), 1, "holds 6 tokens, fewer than this step has"),
        (None, 1, "step 1 is not there. Capture as many steps as you replay"),
    ],
)
def test_a_wrong_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: Any, highest: int, words: str
) -> None:
    if shape is not None:
        ids = np.zeros(shape, dtype=np.int32)
        ids[0] = highest
        write(tmp_path, ids)
    with pytest.raises(ValueError, match=words):
        reader(tmp_path, monkeypatch).ids(1, Role.RECORDED, S * B)


def test_outside_megatrons_training(tmp_path: Path) -> None:
    found = ReplayedRouting(config(moe_echo_replay_routing=str(tmp_path)))
    with pytest.raises(ValueError, match="In a loop of your own use Megatron's RouterReplay"):
        found.ids(1, Role.RECORDED, S * B)


def test_layers_with_experts() -> None:
    dense_first = config(num_layers=4, moe_layer_freq=[0, 1, 1, 1])
    assert replay._moe_layers(dense_first) == [2, 3, 4]
    assert replay._moe_layers(config(num_layers=4, moe_layer_freq=2)) == [1, 3]
