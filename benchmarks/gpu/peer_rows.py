"""The one-sided transport between processes on one device, on a GPU or without one on the CPU.

With ``--clones`` a layer over it: with clones it computes what it does without.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import hidden_clones
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_echo.dispatch.layout import PairCounts, histogram
from megatron_echo.dispatch.transports import PeerBuffers, SymmetricMemoryTransport
from megatron_echo.planner.plan import ClonePlan

TOKENS, TOPK, HIDDEN, GROUPS, STEPS = 300, 3, 1024, 4, 20
EXPERTS, SLOTS, FFN = 4, 2, 512
LARGEST_ERROR = 2e-2  # of bf16: parts of a weight's gradient are summed in another order


def check_step(transport: SymmetricMemoryTransport, step: int, device: torch.device) -> None:
    """Every row comes back doubled, whoever had it; values are chosen so that sums are exact."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    generator = torch.Generator().manual_seed(step * ranks + rank)
    hidden, weight = (
        torch.randint(-31, 32, (TOKENS, HIDDEN), generator=generator).bfloat16().to(device)
        for _ in range(2)
    )
    hidden.requires_grad_()
    noise = torch.rand(TOKENS, ranks * GROUPS + 1, generator=generator)
    noise[:, : 1 + step % GROUPS] += 0.5  # the first experts are hot
    experts = noise.topk(TOPK).indices.int().to(device)
    probs = torch.rand(TOKENS, TOPK, generator=generator).to(device).requires_grad_()
    chosen = experts < ranks * GROUPS

    sent = histogram(experts.reshape(-1).to(torch.int64), ranks * GROUPS + 1)
    everyone = [torch.empty_like(sent, device="cpu") for _ in range(ranks)]
    dist.all_gather(everyone, sent.cpu())
    counts = PairCounts.of(torch.stack(everyone)[:, :-1].to(device), rank)
    num_rows = ranks * TOKENS * TOPK + 64
    delivery = transport.dispatch(hidden, experts, probs, num_rows, counts=counts)
    output = transport.combine(delivery.rows * 2, delivery.receipt)
    (output * weight).sum().backward(retain_graph=True)
    copies = chosen.sum(1, keepdim=True)
    assert torch.equal(output, 2 * copies * hidden.float())
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, (2 * copies * weight.float()).bfloat16())
    total = delivery.probs[: int(delivery.ends[-1])].sum()  # behind them is anything
    brought = torch.where(chosen, probs, 0).sum()
    dist.all_reduce(sums := torch.stack((total, brought)).detach().cpu())
    torch.testing.assert_close(sums[0], sums[1])
    probs.grad = None
    total.backward()
    assert torch.equal(probs.grad, chosen.float())
    assert delivery.dropped == 0


def pass_of_layer(slots: int, device: torch.device) -> tuple[int, list[torch.Tensor]]:
    """Clones that a layer made, and its output and gradients; the same weights each time."""
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    layer = hidden_clones.build(HIDDEN, FFN, EXPERTS, torch.bfloat16, 2, slots)
    plans: list[ClonePlan] = []
    layer.experts.register_forward_pre_hook(lambda *_: plans.append(layer.token_dispatcher.plan))
    torch.manual_seed(dist.get_rank())
    hidden, cotangent = torch.randn(2, TOKENS, 1, HIDDEN, device=device).bfloat16()
    hidden.requires_grad_()
    output, _ = layer(layer.await_gradients(hidden))
    output.backward(cotangent)
    grads = [leaf.grad for leaf in (hidden, *layer.experts.parameters())]
    return int(plans[0].num_clones) if slots else 0, [output.detach(), *grads]


def check_clones(device: torch.device) -> None:
    """The router's choice is uneven, so that there are clones."""
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    _, expected = pass_of_layer(0, device)
    clones, found = pass_of_layer(SLOTS, device)
    assert clones > 0
    errors = [
        ((ours.double() - exact.double()).norm() / exact.double().norm()).item()
        for ours, exact in zip(found, expected, strict=True)
    ]
    assert max(errors) <= LARGEST_ERROR, errors


def main() -> None:
    """One rank."""
    dist.init_process_group("gloo")
    device = torch.device("cuda", 0) if torch.accelerator.is_available() else torch.device("cpu")
    if "--clones" in sys.argv:
        check_clones(device)
    else:
        buffers = PeerBuffers(dist.group.WORLD)
        for step in range(STEPS):
            check_step(SymmetricMemoryTransport(buffers, GROUPS, 16), step, device)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
