"""A plain Megatron training script, as a fork has one: it knows nothing of megatron_echo."""

from functools import partial

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
    pretrain_cfg_container_from_args,
)
from megatron.training.arguments import parse_and_validate_args


def provide_datasets(num_samples):
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split=args.split or "1,1,1",
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, num_samples, lambda: True, config).build()


provide_datasets.is_distributed = True


def loss_func(mask, output):
    mask = mask.reshape(-1)
    loss = (output.float().view(-1) * mask).sum()
    tokens = mask.sum().int()
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens])}


def forward_step(iterator, model):
    batch = {key: value.cuda() for key, value in next(iterator).items()}
    output = model(
        batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"]
    )
    return output, partial(loss_func, batch["loss_mask"])


if __name__ == "__main__":
    arguments = parse_and_validate_args()
    model_config = gpt_config_from_args(arguments, core_transformer_config_from_args(arguments))
    pretrain(
        pretrain_cfg_container_from_args(arguments, model_config),
        provide_datasets,
        ModelType.encoder_or_decoder,
        forward_step,
    )
