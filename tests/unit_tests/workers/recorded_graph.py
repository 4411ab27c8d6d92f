"""On two ranks: a step with collectives and messages, captured and replayed against eager."""

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_echo.cpu_backend.recorded_graph import RecordedGraph, capture


def main() -> None:
    """Compare six replays with eager steps, bit for bit."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    weight = torch.randn(4, 4, requires_grad=True)
    inputs, main_grad = torch.empty(2, 4), torch.zeros(4, 4)

    def step() -> Tensor:
        output = (inputs @ weight).tanh()
        summed = output.detach().clone()
        work = dist.all_reduce(summed, async_op=True)
        received = torch.empty_like(output)
        operations = [
            dist.P2POp(dist.irecv, received, (rank - 1) % ranks),
            dist.P2POp(dist.isend, output.detach(), (rank + 1) % ranks),
        ]
        for each in dist.batch_isend_irecv(operations):
            each.wait()
        work.wait()
        gathered, part = torch.empty(2 * ranks, 4), torch.empty(2, 4)
        dist.all_gather_into_tensor(gathered, received)
        dist.reduce_scatter_tensor(part, gathered)
        loss = (output * (summed + received + part)).sum()
        loss.backward()
        main_grad.add_(weight.grad)
        weight.grad = None
        dist.barrier()
        return loss.detach()

    batches = [torch.randn(2, 4) for _ in range(6)]
    expected = []
    for batch in batches:
        inputs.copy_(batch)
        expected.append((step().clone(), main_grad.clone()))
    main_grad.zero_()
    graph = RecordedGraph()
    with capture(graph):
        loss = step()
    assert not main_grad.any()
    for batch, (eager_loss, eager_grad) in zip(batches, expected, strict=True):
        inputs.copy_(batch)
        graph.replay()
        assert torch.equal(loss, eager_loss)
        assert torch.equal(main_grad, eager_grad)
    dist.destroy_process_group()  # the graph still holds it; the process must end all the same


if __name__ == "__main__":
    main()
