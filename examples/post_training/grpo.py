"""Reinforcement learning in the shape of GRPO, on a toy reward, through Megatron's GPTModel.

Each step samples groups of answers with the model in evaluation, records the routing of every token
there, and trains on packed batches whose tokens go to the experts that the sampler chose (R3)::

    torchrun --nproc-per-node 2 examples/post_training/grpo.py

A prompt is a few random words, and an answer is rewarded by the share of its words that are even.
"""

import argparse
import os
from collections.abc import Iterator
from typing import Any

from megatron_echo import cpu_backend

os.environ["CUDA_VISIBLE_DEVICES"] = ""
cpu_backend.enable(verbose=False)  # before Megatron is imported

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from megatron.core import distributed, optimizer, parallel_state, pipeline_parallel  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer.moe.router_replay import RouterReplay as Replay  # noqa: E402
from megatron.core.transformer.moe.router_replay import RouterReplayAction as Action  # noqa: E402
from torch import Tensor  # noqa: E402

from megatron_echo.config import EchoTransformerConfig  # noqa: E402
from megatron_echo.model_builder import EchoGPTModelBuilder, EchoGPTModelConfig  # noqa: E402
from megatron_echo.record.statistics import console_line  # noqa: E402
from megatron_echo.step.step_end import StepEnd  # noqa: E402

END, WORDS = 0, 12
LONGEST_PROMPT, LONGEST_ANSWER = 24, 8
PROMPTS, GROUP = 8, 8  # on each rank and step; answers of a prompt
BOUND = PROMPTS * GROUP * (LONGEST_PROMPT + LONGEST_ANSWER)  # tokens; the sampler does not pack


def build() -> tuple[EchoTransformerConfig, distributed.DistributedDataParallel]:
    """Two layers of eight experts over all ranks, with clones."""
    ranks = dist.get_world_size()
    config = EchoTransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, num_moe_experts=8, moe_router_topk=2,
        moe_ffn_hidden_size=64, expert_model_parallel_size=ranks, transformer_impl="local",
        moe_enable_echo=True, moe_num_echo_experts=8, moe_echo_max_tokens_per_rank=BOUND,
        moe_enable_routing_replay=True, variable_seq_lengths=True, calculate_per_token_loss=True,
        moe_token_dispatcher_type="alltoall", normalization="RMSNorm", add_bias_linear=False,
        gated_linear_unit=True, activation_func=F.silu, hidden_dropout=0.0, attention_dropout=0.0,
        masked_softmax_fusion=False,
    )  # fmt: skip
    model_config = EchoGPTModelConfig(
        transformer=config, vocab_size=WORDS, seq_length=LONGEST_PROMPT + LONGEST_ANSWER,
        should_pad_vocab=False, position_embedding_type="rope",
    )  # fmt: skip
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = EchoGPTModelBuilder(model_config).build_model(groups)
    return config, distributed.DistributedDataParallel(
        config, distributed.DistributedDataParallelConfig(), model
    )


@torch.no_grad()
def sample(model: torch.nn.Module, prompts: list[Tensor], random: torch.Generator) -> list[dict]:
    """An answer to each prompt, with its log-probabilities and the experts of its tokens."""
    model.eval()
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    tokens = torch.full((len(prompts), LONGEST_PROMPT + LONGEST_ANSWER), END)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    places, every = torch.arange(tokens.shape[1]).expand_as(tokens), torch.arange(len(prompts))
    mask = torch.ones(1, 1, tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    is_open, logged = torch.ones(len(prompts), dtype=torch.bool), []
    Replay.set_global_router_replay_action(Action.RECORD)
    for _ in range(LONGEST_ANSWER):  # ranks call the model together: as often on each
        logits = model(tokens, places, mask)[every, lengths - 1].float().log_softmax(-1)
        word = torch.multinomial(logits.exp(), 1, generator=random)[:, 0]
        tokens[every[is_open], lengths[is_open]] = word[is_open]
        logged.append(logits[every, word])
        lengths, is_open = lengths + is_open, is_open & (word != END)
    recorded = torch.stack(Replay.get_recorded_data(), dim=1)  # of the last call: all tokens
    recorded = recorded.unflatten(0, (tokens.shape[1], len(prompts)))
    return [
        {
            "tokens": tokens[row, :length],
            "prompt": len(prompts[row]),
            "logs": torch.stack(logged)[: length - len(prompts[row]), row],
            "ids": recorded[: length - 1, row],  # the last word is nobody's input
        }
        for row, length in enumerate(lengths.tolist())
    ]


def reward(answer: dict) -> float:
    """The share of the words that are even, 0 for an answer without any; its end is no word."""
    words = answer["tokens"][answer["prompt"] :]
    return float(((words != END) & (words % 2 == 0)).sum() / (words != END).sum().clamp(min=1))


def packed(answers: list[dict], number: int) -> Iterator[dict]:
    """So many microbatches, as even as they come: the longest goes to the emptiest."""
    bins: list[list[dict]] = [[] for _ in range(number)]
    for answer in sorted(answers, key=lambda answer: -len(answer["ids"])):
        min(bins, key=lambda some: sum(len(each["ids"]) for each in some)).append(answer)
    for some in bins:
        lengths = [len(each["ids"]) for each in some]
        pairs = list(zip(lengths, some, strict=True))
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        yield {
            "tokens": torch.cat([each["tokens"][:-1] for each in some])[None],
            "labels": torch.cat([each["tokens"][1:] for each in some]),
            "places": torch.cat([torch.arange(length) for length in lengths])[None],
            "answer": torch.cat([torch.arange(n) >= e["prompt"] - 1 for n, e in pairs]),
            "logs": torch.cat([each["logs"] for each in some]),
            "advantage": torch.cat([each["advantage"].expand(len(each["logs"])) for each in some]),
            "ids": torch.cat([each["ids"] for each in some]),
            "packing": PackedSeqParams(
                qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends,
                max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths),
            ),
        }  # fmt: skip


def forward_step(batches: Iterator[dict], model: torch.nn.Module) -> Any:
    """One microbatch: every token goes where the sampler sent it."""
    batch = next(batches)
    Replay.set_replay_data(list(batch["ids"].unbind(1)))

    def loss(logits: Tensor) -> Any:
        rows = logits[0][batch["answer"]].float().log_softmax(-1)
        logs = rows.gather(1, batch["labels"][batch["answer"]][:, None])[:, 0]
        ratio = (logs - batch["logs"]).exp()
        total = -torch.minimum(
            ratio * batch["advantage"], ratio.clamp(0.8, 1.2) * batch["advantage"]
        ).sum()
        off = (logs - batch["logs"]).detach().abs().max()
        return total, torch.tensor(len(logs)), {"off": off}

    return model(batch["tokens"], batch["places"], None, packed_seq_params=batch["packing"]), loss


def main() -> None:
    """Train, and say what the reward, the load and the replay are."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    model_parallel_cuda_manual_seed(1)
    config, model = build()
    adam = optimizer.get_megatron_optimizer(
        optimizer.OptimizerConfig(optimizer="adam", lr=3e-3), [model]
    )
    random = torch.Generator().manual_seed(dist.get_rank())
    for step in range(1, steps + 1):
        lengths = torch.randint(1, LONGEST_PROMPT + 1, (PROMPTS,), generator=random).tolist()
        prompts = [torch.randint(1, WORDS, (n,), generator=random) for n in lengths]
        answers = sample(model, [p for p in prompts for _ in range(GROUP)], random)
        rewards = torch.tensor([reward(answer) for answer in answers]).view(PROMPTS, GROUP)
        spread = rewards.std(1, keepdim=True) + 1e-4
        for answer, advantage in zip(
            answers, ((rewards - rewards.mean(1, keepdim=True)) / spread).view(-1), strict=True
        ):
            answer["advantage"] = advantage
        model.train()
        model.zero_grad_buffer()
        Replay.clear_global_indices()
        Replay.set_global_router_replay_action(Action.REPLAY_FORWARD)
        found = pipeline_parallel.get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=packed(answers, 2), model=[model],
            num_microbatches=2, seq_length=BOUND, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        adam.step()
        mean = rewards.mean()
        dist.all_reduce(mean)
        load = StepEnd.of(config).statistics.read()
        off = max(float(each["off"]) for each in found)
        if dist.get_rank() == 0 and (step in (1, steps) or step % 5 == 0):
            print(f"reward {mean / dist.get_world_size():.3f} in step {step}; sampler and training "
                  f"differ by {off:.1e} in a log-probability", flush=True)  # fmt: skip
            print(console_line(load, step), flush=True)


if __name__ == "__main__":
    main()
