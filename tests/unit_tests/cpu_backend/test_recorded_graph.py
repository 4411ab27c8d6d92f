"""The stand-in for a CUDA graph: what a capture forbids, and what a replay does."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import launch
import pytest
import torch
from torch import Tensor

from megatron_echo.cpu_backend.recorded_graph import CaptureError, RecordedGraph, capture

WORKER = Path(__file__).resolve().parent.parent / "workers" / "recorded_graph.py"


def captured(function: Callable[[], object]) -> tuple[RecordedGraph, object]:
    graph = RecordedGraph()
    with capture(graph):
        result = function()
    return graph, result


def test_forward_and_backward_have_the_bits_of_eager_steps() -> None:
    """Gradients accumulate into static memory, inputs arrive in static memory."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    total, inputs = torch.zeros(3, 5), torch.empty(4, 5)
    batches = [torch.randn(4, 5) for _ in range(6)]

    def step() -> Tensor:
        hidden = layer(inputs).softmax(-1)
        values, order = hidden.sort(-1)
        loss = (values * torch.arange(3)).sum() + hidden[order[:, 0].new_zeros(2)].pow(2).sum()
        loss.backward()
        total.add_(layer.weight.grad)
        layer.weight.grad = layer.bias.grad = None
        return loss.detach()

    expected = []
    for batch in batches:
        inputs.copy_(batch)
        expected.append((step().clone(), total.clone()))
    total.zero_()
    graph, loss = captured(step)
    assert not total.any()  # a capture has no effect
    for batch, (eager_loss, eager_total) in zip(batches, expected, strict=True):
        inputs.copy_(batch)
        graph.replay()
        assert torch.equal(loss, eager_loss)
        assert torch.equal(total, eager_total)


def test_views_and_writes_in_place_keep_their_memory() -> None:
    base = torch.zeros(6)

    def step() -> tuple[Tensor, Tensor]:
        view = base.view(2, 3)[1]
        view += 1
        doubled = base * 2
        doubled[0].fill_(7)
        return view, doubled

    graph, (view, doubled) = captured(step)
    assert base.tolist() == [0] * 6
    base.fill_(10)
    graph.replay()
    graph.replay()
    assert base.tolist() == [10, 10, 10, 12, 12, 12]
    assert view.tolist() == [12, 12, 12]
    assert doubled.tolist() == [7, 20, 20, 24, 24, 24]
    assert len(graph) == 3  # views are no operations


def test_python_numbers_are_those_of_the_capture() -> None:
    numbers, source = iter((2.0, 3.0)), torch.ones(1)
    graph, result = captured(lambda: source * next(numbers))
    source.fill_(5)
    graph.replay()
    assert result.item() == 10
    assert next(numbers) == 3.0


def test_memory_that_the_step_frees_or_swaps_is_there_in_a_replay() -> None:
    """Megatron empties tensors by ``.data =`` and by resizing their storage."""
    source = torch.ones(4)

    def step() -> Tensor:
        middle = source + 1
        result = middle * 3
        middle.data = torch.empty(0)
        other = source * 2
        result = result + other
        other.untyped_storage().resize_(0)
        return result

    graph, result = captured(step)
    source.fill_(2)
    graph.replay()
    assert result.tolist() == [13] * 4


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: t.nonzero(),
        lambda t: t[t > 0],
        lambda t: torch.masked_select(t, t > 0),
        lambda t: torch.unique(t),
        lambda t: t.index_put_((t > 0,), torch.ones(3)),
    ],
    ids=["item", "bool", "nonzero", "mask", "masked_select", "unique", "put"],
)
def test_what_the_host_would_wait_for_is_refused(read: Callable[[Tensor], object]) -> None:
    tensor = torch.tensor([1.0, 2.0, 3.0])
    with pytest.raises(CaptureError, match="the host would read a value"):
        captured(lambda: read(tensor.clone()))
    assert not RecordedGraph.is_capturing()
    read(tensor.clone())  # and outside it may be read again


def test_what_is_static_is_not_refused() -> None:
    tensor, index = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2, 0])

    def step() -> Tensor:
        picked = tensor[index]
        cleared = tensor.clone()
        cleared[tensor < 0] = 0
        rows = tensor.view(3, 1) * 1
        rows[tensor < 0, :] = 0
        return torch.cat((picked, cleared, rows.view(3)))

    graph, result = captured(step)
    tensor.neg_()
    graph.replay()
    assert result.tolist() == [-3, -1, 0, 2, 0, 0, 2, 0]


def test_states_of_generators_belong_to_the_host() -> None:
    """Megatron's RNG tracker compares them in each fork."""
    source = torch.ones(2)

    def step() -> Tensor:
        before = torch.get_rng_state()
        result = source + 1
        assert torch.all(before == torch.get_rng_state()).item()
        return result

    assert len(captured(step)[0]) == 1


def test_random_numbers_are_refused_and_dropout_of_nothing_is_not() -> None:
    source = torch.ones(2)
    captured(lambda: torch.nn.functional.dropout(source, 0.0))
    with pytest.raises(CaptureError, match="--attention-dropout 0"):
        captured(lambda: torch.nn.functional.dropout(source, 0.5))


def test_one_capture_at_a_time() -> None:
    outer = RecordedGraph()
    with capture(outer):
        assert RecordedGraph.is_capturing()
        with pytest.raises(CaptureError, match="End that capture first"):
            RecordedGraph().capture_begin()
    assert not RecordedGraph.is_capturing()


def test_a_reset_lets_the_memory_go() -> None:
    source = torch.ones(4)
    graph, result = captured(lambda: (source + 1) * 2)
    memory = weakref.ref(result)
    del result
    graph.reset()
    gc.collect()
    assert memory() is None
    graph.replay()  # nothing


def test_cuda_s_names_lead_here(tmp_path: Path) -> None:
    """With the CPU backend on, ``torch.cuda.graph`` captures."""
    source = torch.ones(2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle()):
        assert torch.cuda.is_current_stream_capturing()
        result = source * 3
    source.fill_(2)
    graph.replay()
    assert result.tolist() == [6, 6]
    assert isinstance(graph, RecordedGraph)


def test_collectives_and_messages_between_ranks() -> None:
    """Gloo on two ranks: all of them are repeated, and waited for before their data is used."""
    launch.run([], 2, script=WORKER, timeout=60).check()
