"""Elastic continued training in Megatron-LM's own loop (megatron.training of Megatron-Core 0.19 or newer).

    torchrun --nproc-per-node 8 examples/megatron_lm/pretrain_elastic.py --flextron-checkpoint run/sorted \
        --num-subnetworks 3 --global-batch-size 1024 [every other argument of Megatron-LM's pretrain_gpt.py]

Each step runs the full model and --num-subnetworks random sub-networks on the same samples, as micro-batches of Megatron-LM's
schedule. --global-batch-size counts every sample once for each network: 1024 with 3 sub-networks are 256 different samples.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import datasets, parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import get_args, get_timers, get_tokenizer, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split

from flextron_mcore.checkpoint.reader import load_model
from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint, write_info
from flextron_mcore.config import FlextronError
from flextron_mcore.doors import ElasticTraining, RepeatedMicroBatches, adapt
from flextron_mcore.specs import architecture, default_space, elastic_layer_spec


def add_elastic_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the arguments of elastic training to Megatron-LM's."""
    group = parser.add_argument_group("elastic training")
    group.add_argument("--flextron-checkpoint", help="checkpoint to start from, with its space; default: random weights")
    group.add_argument("--num-subnetworks", type=int, default=3, help="random sub-networks in each step, beside the full model")
    group.add_argument(
        "--subnetwork-mode",
        choices=("flextron", "matformer"),
        default="flextron",
        help="flextron: all elastic axes vary, layer by layer; matformer: only MLP neurons, the same number in all layers",
    )
    return parser


def train_valid_test_datasets_provider(elastic: ElasticTraining, num_samples: Any, vp_stage: int | None = None) -> Any:
    """Megatron-LM's datasets (training, validation, test) on every rank. Training repeats each micro-batch for every network."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,  # the attention applies the causal mask itself
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
    )
    train, *others = num_samples
    kind = MockGPTDataset if args.mock_data else GPTDataset
    builder = BlendedMegatronDatasetBuilder(kind, [train // elastic.per_batch, *others], lambda: True, config)
    train_data, valid_data, test_data = builder.build()
    if train_data is not None:
        size = args.micro_batch_size * parallel_state.get_data_parallel_world_size()
        train_data = RepeatedMicroBatches(train_data, elastic.per_batch, size)
    return train_data, valid_data, test_data


def get_batch(data_iterator: Any) -> dict[str, torch.Tensor]:
    """Tensors of the next micro-batch, on the GPU."""
    return {name: value.cuda(non_blocking=True) for name, value in next(data_iterator).items() if torch.is_tensor(value)}


def forward_step(elastic: ElasticTraining, data_iterator: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """Per-token losses [B, S] of the next micro-batch through the network that is its turn, and their loss function."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    timers("batch-generator").stop()
    index = elastic.choose(model, get_args().curr_iteration, get_num_microbatches())
    loss = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return loss, partial(elastic.loss_function, batch["loss_mask"], [index], model.training)


def prepare_chunks(elastic: ElasticTraining, info: CheckpointInfo | None, chunks: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """Load the weights of the checkpoint, if there is one. Megatron-LM calls this with the built model, before it wraps it.

    Raises FlextronError if the layers have another elastic space than the checkpoint.
    """
    for chunk in chunks:
        elastic.watch(chunk)
        if info and any(layer.mlp.space != info.space for layer in chunk.decoder.layers):
            raise FlextronError(f"--spec: its space is not that of {info.path}: use elastic_layer_spec, or leave --spec out")
        if info:
            load_model(chunk, info)
    return chunks


def check(args: argparse.Namespace, config: Any, info: CheckpointInfo | None) -> None:
    """Raise FlextronError for arguments that do not fit elastic training or the checkpoint. config: TransformerConfig."""
    if args.dataloader_type != "single":
        raise FlextronError(
            f"--dataloader-type {args.dataloader_type}: networks share samples in order: use --dataloader-type single"
        )
    names = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "num_query_groups", "kv_channels", "gated")
    given = architecture(config)
    for name in names if info else ():
        have, want = getattr(given, name), getattr(info.model, name)
        if have != want:
            raise FlextronError(
                f"--flextron-checkpoint {args.flextron_checkpoint}: its {name} is {want}, the arguments say {have}: give the "
                "arguments of its model"
            )


def describe(args: argparse.Namespace, info: CheckpointInfo) -> None:
    """Add flextron.json to the checkpoints in args.save, so that `flextron` can open them. info: checkpoint of the start."""
    for folder in sorted(Path(args.save).glob("iter_*")):
        step = int(folder.name.removeprefix("iter_"))
        write_info(folder, info.at_step(step, dtype="bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"))


def main() -> None:
    if not torch.cuda.is_available():
        import on_cpu

        on_cpu.enable()
    args = parse_and_validate_args(add_elastic_args, args_defaults={"tokenizer_type": "HuggingFaceTokenizer"})
    if not (Path(datasets.__file__).parent / "Makefile").exists():
        # Megatron-LM compiles C++ helpers of the datasets at every start. The wheel lacks their sources: it has them compiled.
        datasets.utils.compile_helpers = lambda: None
    info = open_checkpoint(args.flextron_checkpoint) if args.flextron_checkpoint else None
    model = gpt_config_from_args(args)
    adapt(model.transformer)
    args.calculate_per_token_loss = True
    check(args, model.transformer, info)
    space = info.space if info else default_space(model.transformer)
    elastic = ElasticTraining(architecture(model.transformer), space, args.num_subnetworks, args.seed, args.subnetwork_mode)
    if model.transformer_layer_spec in (None, elastic_layer_spec):  # a user's --spec is kept
        model.transformer_layer_spec = partial(elastic_layer_spec, space=space)
    model.pre_wrap_hooks.append(partial(prepare_chunks, elastic, info))
    provider = partial(train_valid_test_datasets_provider, elastic)
    provider.is_distributed = True
    pretrain(
        pretrain_cfg_container_from_args(args, model), provider, ModelType.encoder_or_decoder, partial(forward_step, elastic)
    )
    if args.save and info and torch.distributed.get_rank() == 0:
        describe(args, info)


if __name__ == "__main__":
    try:
        main()
    except FlextronError as error:
        raise SystemExit(f"error: {error}") from None
