"""Write a Llama as GGUF, one tensor in memory at a time.

Shape suffixes: N heads, P the two halves of a head, I channels of a half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import torch

from flextron_mcore.checkpoint.parts import split
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.exports.card import describe
from flextron_mcore.exports.cut import cut, placed_tensors
from flextron_mcore.exports.formats import Job
from flextron_mcore.exports.gguf.tokenizer import Vocabulary
from flextron_mcore.exports.reference import frequencies, llama3_factors
from flextron_mcore.families.family import Names
from flextron_mcore.runtime.disk import check_space
from flextron_mcore.space import LayerChoice, count_parameters

_ROPE_FACTORS = "rope_freqs.weight"
_NAMES = Names(
    {
        "embedding.word_embeddings": "token_embd",
        "self_attention.linear_qkv.layer_norm": "attn_norm",
        "self_attention.linear_qkv": ("attn_q", "attn_k", "attn_v"),
        "self_attention.linear_proj": "attn_output",
        "mlp.linear_fc1.layer_norm": "ffn_norm",
        "mlp.linear_fc1": ("ffn_gate", "ffn_up"),
        "mlp.linear_fc2": "ffn_down",
        "decoder.final_layernorm": "output_norm",
        "output_layer": "output",
    },
    layers="blk.{}.",
)


def write_file(job: Job, file: Path, kind: str, vocabulary: Vocabulary | None) -> int:
    """Write job.net as `file` in job.out; returns the number of parameters.

    kind: f32, f16 or q8_0. Raises FlextronError where the disk is too small, or a weight too large.
    """
    model, layers, tensors = job.info.model, job.net.executed_layers, cut(job.info, job.net)
    mapped = _NAMES.map(placed_tensors(model, job.net), "format=gguf")
    writer = gguf.GGUFWriter(file, "deci")
    _add_metadata(writer, model, layers, job.net.hidden_size, kind)
    if vocabulary:
        vocabulary.add_to(writer)
    else:
        writer.add_tokenizer_model("no_vocab")
    factors = _rope_factors(model)
    total = 0
    shapes = [pair for each in mapped for pair in each.shapes.items()]
    for name, shape in [*([] if factors is None else [(_ROPE_FACTORS, factors.shape)]), *shapes]:
        stored = _stored_type(shape, kind)
        total += _nbytes(shape, stored)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), _nbytes(shape, stored), stored)
    check_space(job.out, total)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        parameters = 0
        for each in mapped:
            whole = tensors[each.placed.name].load().float()
            for (name, shape), tensor in zip(each.shapes.items(), split(each, whole), strict=True):
                if tuple(tensor.shape) != shape:
                    raise AssertionError(f"{name}: {tuple(tensor.shape)} instead of {shape}")
                data = _encode(name, _permuted(name, tensor, model.kv_channels), _stored_type(shape, kind))
                writer.write_tensor_data(data)
                parameters += tensor.numel()
                if job.progress:
                    job.progress(data.nbytes)
    except OSError as error:
        if error.errno is None:  # numpy's tofile gives no reason: bytes that the disk did not take
            raise FlextronError(
                f"{job.out}: cannot be written: No space left on device; free space or choose another out="
            ) from None
        raise
    finally:
        writer.close()
    return parameters


def _add_metadata(
    writer: gguf.GGUFWriter, model: ModelConfig, layers: Sequence[LayerChoice], hidden_size: int, kind: str
) -> None:
    files = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_type("model")
    writer.add_name("A Flextron sub-network")
    writer.add_file_type(files[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(hidden_size)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length([layer.ffn_hidden_size for layer in layers])
    writer.add_head_count([layer.num_attention_heads for layer in layers])
    writer.add_head_count_kv([layer.kv_groups for layer in layers])
    writer.add_key_length(model.kv_channels)  # without these, llama.cpp takes hidden size / heads of the first layer
    writer.add_value_length(model.kv_channels)
    writer.add_layer_norm_rms_eps(model.layernorm_epsilon)
    writer.add_rope_dimension_count(model.kv_channels)
    writer.add_rope_freq_base(model.rotary_base)
    linear = model.rope_scaling if (model.rope_scaling or {}).get("type") == "linear" else None
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR if linear else gguf.RopeScalingType.NONE)
    if linear:
        writer.add_rope_scaling_factor(linear["factor"])


def _rope_factors(model: ModelConfig) -> np.ndarray | None:
    """Divisors of the frequencies in llama3's scaling [kv_channels / 2], fp32; None for models without it."""
    scaling = model.rope_scaling or {}
    if scaling.get("type") != "llama3":
        return None
    return llama3_factors(scaling, frequencies(model.rotary_base, model.kv_channels)).float().numpy()


def _permuted(name: str, tensor: torch.Tensor, size: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring channels of a query or key, transformers one half of the head with the other."""
    if ".attn_q." not in name and ".attn_k." not in name:
        return tensor
    tensor_NPI = tensor.unflatten(0, (-1, 2, size // 2))
    return tensor_NPI.transpose(1, 2).flatten(0, 2)


def _stored_type(shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    """Vectors stay in f32, which llama.cpp wants; q8_0 has blocks of 32 along a row, so matrices of other widths are f16."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    stored = gguf.GGMLQuantizationType[kind.upper()]
    return gguf.GGMLQuantizationType.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[stored][0] else stored


def _nbytes(shape: tuple[int, ...], stored: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[stored]
    return math.prod(shape) // block * size


def _encode(name: str, tensor: torch.Tensor, stored: gguf.GGMLQuantizationType) -> np.ndarray:
    """The bytes of a tensor. Raises FlextronError for a weight beyond f16's range, which would become infinite."""
    values = np.ascontiguousarray(tensor.numpy())
    if stored is gguf.GGMLQuantizationType.F16 and (largest := max(values.max(), -values.min())) > np.finfo(np.float16).max:
        raise FlextronError(f"gguf.type: {name} has a weight of {largest:.3g}, f16 ends at 65504: use gguf.type=f32")
    return gguf.quants.quantize(values, stored)


def card(job: Job, file: Path, kind: str, vocabulary: Vocabulary | None) -> str:
    """README.md of an export."""
    parameters, full = count_parameters(job.info.model, job.net), count_parameters(job.info.model)
    costs = describe(replace(job, dtype="fp32" if kind == "f32" else "fp16")).splitlines()
    costs = [line for line in costs if not line.startswith("| weights |")]  # which knows no q8_0
    if vocabulary is None:
        use = "llama.cpp loads it and takes token ids, not text (`llama_cpp.Llama.eval`)."
    else:
        use = f'```bash\nllama-cli -m {file.name} -p "The" -n 20 -no-cnv\n```'
    return f"""---
pipeline_tag: text-generation
tags: [flextron, gguf]
---
# A Flextron sub-network

GGUF of architecture `deci`, for llama.cpp: {parameters:,} parameters, {parameters / full:.1%} of the {full:,} of the elastic
model that flextron_mcore cut it from. Weight matrices are in {kind}; the file has {file.stat().st_size:,} bytes.

{chr(10).join(costs)}

{use}
"""
