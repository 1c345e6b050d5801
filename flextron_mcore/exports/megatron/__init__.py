"""Export as a checkpoint of Megatron-Core's own GPTModel, for training and serving without flextron_mcore.

The directory has the layout of a flextron run, which Megatron-LM's `--load` accepts too: `checkpoints/iter_*` and `tokenizer/`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flextron_mcore.axes import added_tensors
from flextron_mcore.checkpoint.precision import converted
from flextron_mcore.checkpoint.reader import DTYPES
from flextron_mcore.checkpoint.store import iteration_path
from flextron_mcore.checkpoint.writer import LazyTensor, write_streaming, write_torch_dist
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.exports.card import describe
from flextron_mcore.exports.cut import cut, cut_config, plain_norms
from flextron_mcore.exports.directory import begin, figures, write_json
from flextron_mcore.exports.formats import Format, Job, rounding
from flextron_mcore.exports.megatron.arguments import LLAMA3, command_line, not_on_the_command_line
from flextron_mcore.exports.megatron.read import read_logits
from flextron_mcore.families.rope import longrope_frequencies, yarn_frequencies
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.space import ElasticSpace, LayerChoice, SubNetwork, weight_bytes

CONFIG_FILE, ARGUMENTS_FILE, CODE_FILE = "model_config.json", "args.txt", "load_model.py"
TRACKER_FILE = "latest_checkpointed_iteration.txt"  # read by Megatron-LM
# Megatron-LM reads this to load one key a layer.
_COMMON = {"content_metadata": {"non_homogeneous_layers": True}}
_CODE = Path(__file__).parent / "code" / CODE_FILE


def write(job: Job) -> dict[str, Any]:
    """Write job.net as a dense model for Megatron-Core. Call on all ranks, which share the tensors.

    Returns format, architecture, parameters, bytes and files; also `reason` if the layers differ, which needs a heterogeneous
    configuration. Raises FlextronError for a model with an axis that an extension adds, a network outside of the space, a job.out
    that is not an empty directory, or a tokenizer directory without a tokenizer.
    """
    info, net, out = job.info, job.net, job.out
    if added := added_tensors():
        raise FlextronError(
            f"format=megatron: Megatron-Core's own layers have no tensor {added[0].name}, which an added axis needs"
        )
    model = _dense(info.model, net)
    layers = net.executed_layers
    widths = {(layer.num_attention_heads, layer.kv_groups) for layer in layers}
    architecture = "GPTModel"
    if not net.is_uniform:
        architecture += (
            " with PerLayerConfig" if len(widths) > 1 or model.rotary_scale != 1 else " with HeterogeneousTransformerConfig"
        )
    # Megatron-LM does not load a checkpoint of iteration 0.
    folder = iteration_path(out, max(info.step, 1))

    def prepared() -> None:
        begin(job, weight_bytes(info.model, net, job.dtype), "tokenizer")
        folder.mkdir(parents=True)

    space = _space(model) if net.is_uniform else None
    tensors = _tensors(job, space)
    on_main_process(prepared)
    if space:
        dense = replace(info, model=model, space=space, dtype=job.dtype, path=None)
        write_streaming(folder, dense, tensors, job.progress, _COMMON, elsewhere=True)
    else:
        write_torch_dist(folder, tensors, job.progress, _COMMON, elsewhere=True)

    def finished() -> dict[str, Any]:
        (folder.parent / TRACKER_FILE).write_text(f"{max(info.step, 1)}\n", encoding="utf-8")
        config = _config(model, layers, len(widths) > 1, job.dtype) | {"checkpoint": str(folder.relative_to(out))}
        write_json(out / CONFIG_FILE, config)
        shutil.copyfile(_CODE, out / CODE_FILE)
        refusal = not_on_the_command_line(model, net)
        if refusal is None:
            (out / ARGUMENTS_FILE).write_text(command_line(model, job.dtype), encoding="utf-8")
        (out / "README.md").write_text(_card(job, architecture, refusal), encoding="utf-8")
        return figures(out, "megatron", architecture, sum(math.prod(tensor.shape) for tensor in tensors.values()))

    return on_main_process(finished) | ({"reason": _reason(len(widths) > 1)} if not net.is_uniform else {})


def logits(job: Job, net: SubNetwork, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] in fp32, computed by the code in the directory, in a process with one rank.

    Call on the main process. Raises FlextronError if Megatron-Core cannot load the directory.

    Args:
        job: the export.
        net: network of the export; unused.
        tokens_BS: token ids.
    """
    return read_logits(job.out, tokens_BS)


FORMAT = Format(write, logits, rounding)


def _dense(model: ModelConfig, net: SubNetwork) -> ModelConfig:
    """Architecture of the dense model, with LayerNorm for "layernorm1p", which Megatron-Core's local layers do not have."""
    model = cut_config(model, net)
    return replace(model, normalization="layernorm") if model.normalization == "layernorm1p" else model


def _tensors(job: Job, space: ElasticSpace | None) -> dict[str, LazyTensor]:
    """Tensors of the dense model in the dtype of the export. space: its elastic space, None for layers that differ."""
    dtype = DTYPES[job.dtype]

    def load(name: str, lazy: LazyTensor) -> torch.Tensor:
        return converted(lazy.load(), dtype, f"tensor {name}")

    tensors = plain_norms(job.info.model, cut(job.info, job.net, space=space, refitted=job.refitted))
    return {name: replace(lazy, dtype=dtype, load=partial(load, name, lazy)) for name, lazy in tensors.items()}


def _space(model: ModelConfig) -> ElasticSpace:
    """Default elastic space of the dense model, or the space of the full model alone if sizes do not divide."""
    try:
        return ElasticSpace.build(model)
    except FlextronError:
        return ElasticSpace.build(model, granularity=1, heads=[1.0], ffn_hidden_size=[1.0])


def _config(model: ModelConfig, layers: list[LayerChoice], heads_differ: bool, dtype: str) -> dict[str, Any]:
    """Content of model_config.json: arguments of TransformerConfig and GPTModel by name, and widths of layers that differ.

    Args:
        model: architecture of the dense model.
        layers: widths of the executed layers.
        heads_differ: True if the numbers of heads differ from layer to layer.
        dtype: fp32, bf16 or fp16.
    """
    scaling: Mapping[str, Any] = dict(model.rope_scaling or {"type": None})
    kind = scaling["type"]
    theirs = kind == "llama3" and all(scaling[name] == value for name, value in LLAMA3.items())
    differ, both = len(set(layers)) > 1, longrope_frequencies(model)
    return {
        "dtype": dtype,
        "activation": model.activation,
        "transformer_config": {
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "ffn_hidden_size": model.ffn_hidden_size,
            "num_attention_heads": model.num_attention_heads,
            "num_query_groups": model.num_query_groups,
            "kv_channels": model.kv_channels,
            "gated_linear_unit": model.gated,
            "normalization": "RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
            "layernorm_epsilon": model.layernorm_epsilon,
            "add_bias_linear": model.bias,
            "add_qkv_bias": model.add_qkv_bias,
            "qk_layernorm": model.qk_layernorm,
            "no_rope_freq": model.no_rope_freq and list(model.no_rope_freq),
            "window_size": model.sliding_window and [model.sliding_window - 1, 0],
            "window_attn_skip_freq": model.window_attn_skip_freq and list(model.window_attn_skip_freq),
            "hidden_dropout": model.hidden_dropout,
            "attention_dropout": model.attention_dropout,
            "init_method_std": model.init_method_std,
        },
        "gpt_model": {
            "vocab_size": model.vocab_size,
            "max_sequence_length": model.max_position_embeddings,
            "position_embedding_type": model.position_embedding_type,
            "rotary_base": model.rotary_base,
            "rotary_percent": model.rotary_percent,
            "rope_scaling": theirs,
            "rope_scaling_factor": scaling["factor"] if theirs else 8.0,
            "seq_len_interpolation_factor": scaling["factor"] if kind == "linear" else None,
            "share_embeddings_and_output_weights": model.share_embeddings_and_output_weights,
        },
        "rope_scaling": {name: scaling[name] for name in ("factor", *LLAMA3)} if kind == "llama3" and not theirs else None,
        "rotary_frequencies": yarn_frequencies(model),
        "rotary_scale": model.rotary_scale,
        "longrope": both and {"short": both[0], "long": both[1], "original": model.short_context},
        "query_heads_differ": heads_differ,
        "block_configs": [_block(layer, heads_differ) for layer in layers] if differ else None,
    }


def _block(layer: LayerChoice, heads_differ: bool) -> dict[str, Any]:
    """Entry of a layer in block_configs of HeterogeneousTransformerConfig, which ignores num_attention_heads.

    heads_differ: True to write num_attention_heads.
    """
    heads = {"num_attention_heads": layer.num_attention_heads} if heads_differ else {}
    return {"attention": {"num_query_groups": layer.kv_groups, **heads}, "mlp": {"ffn_hidden_size": layer.ffn_hidden_size}}


def _reason(heads_differ: bool) -> str:
    """Reason why layers of different widths need more than a TransformerConfig. heads_differ: True if heads differ."""
    if heads_differ:
        return (
            "the query heads differ from layer to layer, which Megatron-Core's HeterogeneousTransformerConfig (KV groups and FFN "
            f"widths) cannot describe: {CODE_FILE} adds them"
        )
    return "the FFN widths differ from layer to layer: HeterogeneousTransformerConfig"


def _card(job: Job, architecture: str, refusal: str | None) -> str:
    """Text of the exported directory's README.md. refusal: reason why there is no args.txt; None if there is one."""
    if refusal is None:
        line = f"`{ARGUMENTS_FILE}` has the arguments of Megatron-LM for this model. To continue its training in RUN, add\n"
        line += "`--pretrained-checkpoint PATH/checkpoints --load RUN --save RUN --tokenizer-type HuggingFaceTokenizer\n"
        line += "--tokenizer-model PATH/tokenizer`."
    else:
        line = f"There is no `{ARGUMENTS_FILE}` with arguments of Megatron-LM: {refusal}."
    own = (
        "`flextron importance checkpoint=PATH ...` makes it elastic again."
        if job.net.is_uniform
        else "flextron cannot open it as a checkpoint, because its layers have different widths."
    )
    return f"""# A Flextron sub-network for Megatron-Core

A `{architecture}` in {job.dtype}, cut from an elastic model by flextron_mcore. `checkpoints/` is a torch_dist checkpoint with the
names and shapes of Megatron-Core's own layers, `{CONFIG_FILE}` has their sizes, and `{CODE_FILE}` builds the
model and loads the weights. Only Megatron-Core is needed.

{line}
{own}

{describe(job)}
"""
