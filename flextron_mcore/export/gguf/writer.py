"""Write a Llama as GGUF, one tensor in memory at a time.

Shape suffixes: N heads, P the two halves of a head, I channels of a half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.export.card import describe
from flextron_mcore.export.cut import cut, executed_layers
from flextron_mcore.export.formats import Job
from flextron_mcore.export.gguf.tokenizer import Vocabulary
from flextron_mcore.export.hf import llama
from flextron_mcore.export.hf.target import Part
from flextron_mcore.runtime.disk import check_space
from flextron_mcore.space import LayerChoice, count_parameters

if TYPE_CHECKING:
    import gguf

FILE = "model.gguf"
TYPES = ("f32", "f16", "q8_0")
_ROPE_FACTORS = "rope_freqs.weight"
_NAMES = {  # of transformers' Llama, without "model." and the layer
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_file(job: Job, kind: str, vocabulary: Vocabulary | None) -> int:
    """Write job.net as FILE in job.out; returns the number of parameters.

    kind: one of TYPES. Raises FlextronError where the disk is too small, or a weight too large.
    """
    import gguf

    model, layers, tensors = job.info.model, executed_layers(job.net), cut(job.info, job.net)
    parts = list(llama.parts(model, layers, job.net.hidden_size))
    writer = gguf.GGUFWriter(job.out / FILE, "deci")
    _add_metadata(writer, model, layers, job.net.hidden_size, kind)
    if vocabulary:
        vocabulary.add_to(writer)
    else:
        writer.add_tokenizer_model("no_vocab")
    factors = _rope_factors(model)
    total = 0
    for name, shape in _shapes(parts, factors):
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
        for part in parts:
            whole = tensors[part.source].load().float()
            for (name, shape), tensor in zip(part.shapes.items(), part.split(whole), strict=True):
                if tuple(tensor.shape) != shape:
                    raise AssertionError(f"{name}: {tuple(tensor.shape)} instead of {shape}")
                data = _encode(_name(name), _permuted(name, tensor, model.kv_channels), _stored_type(shape, kind))
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
    import gguf

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
    """What llama3's scaling divides each frequency by [kv_channels / 2], fp32; None for models without it.

    Source: Llama 3.1's `apply_scaling`: waves longer than a context of original_max_position_embeddings are slowed by `factor`,
    short ones are kept, and in between the frequency is interpolated.
    """
    scaling = model.rope_scaling or {}
    if scaling.get("type") != "llama3":
        return None
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    frequencies = float(model.rotary_base) ** -(np.arange(0, model.kv_channels, 2, dtype=np.float64) / model.kv_channels)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # of each within the original context
    kept = np.clip((turns - low) / (high - low), 0, 1) if high > low else (turns >= high).astype(np.float64)
    return (1 / (kept + (1 - kept) / factor)).astype(np.float32)


def _shapes(parts: Sequence[Part], factors: np.ndarray | None) -> list[tuple[str, tuple[int, ...]]]:
    """GGUF's name and the shape of every tensor, in the order of the file."""
    first = [] if factors is None else [(_ROPE_FACTORS, factors.shape)]
    return first + [(_name(name), shape) for part in parts for name, shape in part.shapes.items()]


def _name(theirs: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    base, kind = theirs.removeprefix("model.").rsplit(".", 1)
    block = ""
    if base.startswith("layers."):
        _, number, base = base.split(".", 2)
        block = f"blk.{number}."
    return f"{block}{_NAMES[base]}.{kind}"


def _permuted(name: str, tensor: torch.Tensor, size: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring channels of a query or key, transformers one half of the head with the other."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return tensor
    tensor_NPI = tensor.unflatten(0, (-1, 2, size // 2))
    return tensor_NPI.transpose(1, 2).flatten(0, 2)


def _stored_type(shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    """Vectors stay in f32, which llama.cpp wants; q8_0 has blocks of 32 along a row, so matrices of other widths are f16."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    stored = GGMLQuantizationType[kind.upper()]
    return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[stored][0] else stored


def _nbytes(shape: tuple[int, ...], stored: gguf.GGMLQuantizationType) -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[stored]
    return math.prod(shape) // block * size


def _encode(name: str, tensor: torch.Tensor, stored: gguf.GGMLQuantizationType) -> np.ndarray:
    """The bytes of a tensor. Raises FlextronError for a weight beyond f16's range, which would become infinite."""
    from gguf import GGMLQuantizationType, quants

    values = np.ascontiguousarray(tensor.numpy())
    if stored is GGMLQuantizationType.F16 and (largest := max(values.max(), -values.min())) > np.finfo(np.float16).max:
        raise FlextronError(f"gguf.type: {name} has a weight of {largest:.3g}, f16 ends at 65504: use gguf.type=f32")
    return quants.quantize(values, stored)


def card(job: Job, kind: str, vocabulary: Vocabulary | None) -> str:
    """README.md of an export."""
    parameters, full = count_parameters(job.info.model, job.net), count_parameters(job.info.model)
    costs = describe(replace(job, dtype="fp32" if kind == "f32" else "fp16")).splitlines()
    costs = [line for line in costs if not line.startswith("| weights |")]  # which knows no q8_0
    if vocabulary is None:
        use = "llama.cpp loads it and takes token ids, not text (`llama_cpp.Llama.eval`)."
    else:
        use = f'```bash\nllama-cli -m {FILE} -p "The" -n 20 -no-cnv\n```'
    return f"""---
pipeline_tag: text-generation
tags: [flextron, gguf]
---
# A Flextron sub-network

GGUF of architecture `deci`, for llama.cpp: {parameters:,} parameters, {parameters / full:.1%} of the {full:,} of the elastic
model that flextron_mcore cut it from. Weight matrices are in {kind}; the file has {(job.out / FILE).stat().st_size:,} bytes.

{chr(10).join(costs)}

{use}
"""
