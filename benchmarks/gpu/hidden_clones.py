"""What clones add to a layer's pass on two ranks, beside compute and in its stream.

Exposed is the time of a pass over that of the same pass whose matrices do not move. A process of
``tools/gpu_check.py``: prints one line of JSON.
"""

import json
import os
import time
from collections.abc import Callable
from unittest import mock

import torch
import torch.distributed as dist

from megatron_echo import cpu_backend

cpu_backend.enable(verbose=False)

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402

from megatron_echo.config import EchoTransformerConfig  # noqa: E402
from megatron_echo.copy_lanes import Backend  # noqa: E402
from megatron_echo.dispatch.transports import peer_buffers  # noqa: E402
from megatron_echo.dispatch.transports.peer_memory import PeerRows  # noqa: E402
from megatron_echo.moe_layer import EchoMoELayer  # noqa: E402

PASSES = 20


def build(
    hidden: int, ffn: int, experts: int, dtype: torch.dtype, topk: int = 4, slots: int | None = None
) -> EchoMoELayer:
    """A layer over both ranks, with as many slots as experts by default."""
    slots = experts if slots is None else slots
    config = EchoTransformerConfig(
        num_layers=1, hidden_size=hidden, num_attention_heads=4, ffn_hidden_size=ffn,
        moe_ffn_hidden_size=ffn, num_moe_experts=experts, moe_router_topk=topk,
        expert_model_parallel_size=dist.get_world_size(), gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, moe_router_load_balancing_type="none",
        add_bias_linear=False, bf16=dtype == torch.bfloat16, params_dtype=dtype,
        moe_enable_echo=True, moe_num_echo_experts=slots, moe_echo_tolerance=0.0,
        moe_echo_token_transport="symmetric_memory",
        moe_echo_expert_dispatcher_type="symmetric_memory",
    )  # fmt: skip
    return EchoMoELayer(config).to("cuda")


def milliseconds(run: Callable[[], None], is_real: bool) -> float:
    """Of one pass, the mean of :data:`PASSES` back to back, of the slower rank."""
    for _ in range(3):
        run()
    dist.barrier()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(PASSES if is_real else 2):
        run()
    torch.cuda.synchronize()
    taken = torch.tensor([(time.perf_counter() - begin) * 1e3], device="cuda")
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return taken.item() / (PASSES if is_real else 2)


def main() -> None:
    """One rank."""
    is_real = torch.accelerator.is_available()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if is_real else "gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1)
    dtype = torch.bfloat16 if is_real else torch.float32
    tokens, *sizes = (4096, 2048, 768, 64) if is_real else (16, 32, 16, 8)
    torch.manual_seed(dist.get_rank())
    shape = tokens, 1, sizes[0]
    hidden = torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)

    def measure() -> float:
        layer = build(*sizes, dtype)

        def run() -> None:
            output, _ = layer(layer.await_gradients(hidden))
            output.backward(hidden.detach())

        return milliseconds(run, is_real)

    beside = measure()
    with mock.patch.object(peer_buffers, "stream_backend", Backend):
        in_one_stream = measure()
    nothing = mock.patch.multiple(
        PeerRows, put_matrices=_nothing, offer_matrices=_nothing, add_matrices=_nothing
    )
    with nothing:
        still = measure()
    if dist.get_rank() == 0:
        figures = {
            "ms": beside,
            "exposed_ms": beside - still,
            "exposed_in_one_stream_ms": in_one_stream - still,
        }
        print(json.dumps(figures), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def _nothing(*_: object) -> None:
    """Move nothing."""


if __name__ == "__main__":
    main()
