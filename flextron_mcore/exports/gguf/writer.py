"""Writing a Llama as GGUF, one tensor in memory at a time.

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
from flextron_mcore.exports.card import describe, title
from flextron_mcore.exports.cut import cut, placed_tensors, plain_norms
from flextron_mcore.exports.formats import Job
from flextron_mcore.exports.gguf.tokenizer import Vocabulary
from flextron_mcore.exports.reference import frequencies, llama3_factors
from flextron_mcore.families.family import Names
from flextron_mcore.runtime.disk import check_space
from flextron_mcore.space import LayerChoice, count_parameters

_NAMES = Names(
    {
        "embedding.word_embeddings": "token_embd",
        "self_attention.linear_qkv.layer_norm": "attn_norm",
        "self_attention.linear_qkv": ("attn_q", "attn_k", "attn_v"),
        "self_attention.q_layernorm": "attn_q_norm",
        "self_attention.k_layernorm": "attn_k_norm",
        "self_attention.linear_proj": "attn_output",
        "mlp.linear_fc1.layer_norm": "ffn_norm",
        "mlp.linear_fc1": ("ffn_gate", "ffn_up"),
        "mlp.linear_fc2": "ffn_down",
        "decoder.final_layernorm": "output_norm",
        "output_layer": "output",
    },
    layers="blk.{}.",
)


def write_file(job: Job, file: Path, kind: str, architecture: str, vocabulary: Vocabulary | None) -> int:
    """Write job.net as a GGUF file, and return the number of parameters.

    Args:
        job: the export.
        file: file in job.out to write.
        kind: type of the weight matrices: f32, f16 or q8_0.
        architecture: architecture in llama.cpp: deci, qwen3 or nemotron.
        vocabulary: tokenizer, or None for a file without one.

    Raises:
        FlextronError: the disk is too small, or a weight is too large for f16.
    """
    model, layers = job.info.model, job.net.executed_layers
    tensors = plain_norms(model, cut(job.info, job.net, refitted=job.refitted))
    mapped = _names(model).map(placed_tensors(model, job.net), "format=gguf")
    writer = gguf.GGUFWriter(file, architecture)
    _add_metadata(writer, model, layers, job.net.hidden_size, kind, title(job))
    if vocabulary:
        vocabulary.add_to(writer)
    else:
        writer.add_tokenizer_model("no_vocab")
    factors = _rope_factors(model)
    total = 0
    shapes = [pair for each in mapped for pair in each.shapes.items()]
    for name, shape in [*((name, values.shape) for name, values in factors.items()), *shapes]:
        stored = _stored_type(shape, kind)
        total += _nbytes(shape, stored)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), _nbytes(shape, stored), stored)
    check_space(job.out, total)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in factors.values():
            writer.write_tensor_data(values)
        parameters = 0
        for each in mapped:
            whole = tensors[each.placed.name].load().float()
            for (name, shape), tensor in zip(each.shapes.items(), split(each, whole), strict=True):
                if tuple(tensor.shape) != shape:
                    raise AssertionError(f"{name}: {tuple(tensor.shape)} instead of {shape}")
                if architecture == "deci":
                    tensor = _permuted(name, tensor, model.kv_channels)
                data = _encode(name, tensor, _stored_type(shape, kind))
                writer.write_tensor_data(data)
                parameters += tensor.numel()
                if job.progress:
                    job.progress(data.nbytes)
    except OSError as error:
        if error.errno is None:  # numpy's tofile raises this for a full disk
            raise FlextronError(
                f"{job.out}: cannot be written: No space left on device; free space or choose another out="
            ) from None
        raise
    finally:
        writer.close()
    return parameters


def _names(model: ModelConfig) -> Names:
    """Names of tensors in GGUF; an MLP without a gate has its first projection as ffn_up."""
    return _NAMES if model.gated else replace(_NAMES, modules={**_NAMES.modules, "mlp.linear_fc1": "ffn_up"})


def _add_metadata(
    writer: gguf.GGUFWriter, model: ModelConfig, layers: Sequence[LayerChoice], hidden_size: int, kind: str, name: str
) -> None:
    """Add the model's sizes, rotary scaling and types to a GGUF file.

    Args:
        writer: writer of the file.
        model: architecture of the full model.
        layers: widths of the executed layers.
        hidden_size: hidden size of the network.
        kind: type of the weight matrices: f32, f16 or q8_0.
        name: name of the exported network.
    """
    files = {"f32": gguf.LlamaFileType.ALL_F32, "f16": gguf.LlamaFileType.MOSTLY_F16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(files[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.max_position_embeddings)
    writer.add_embedding_length(hidden_size)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length([layer.ffn_hidden_size for layer in layers])
    writer.add_head_count([layer.num_attention_heads for layer in layers])
    writer.add_head_count_kv([layer.kv_groups for layer in layers])
    writer.add_key_length(model.kv_channels)  # llama.cpp's default is hidden size / heads of the first layer
    writer.add_value_length(model.kv_channels)
    if model.normalization == "rmsnorm":
        writer.add_layer_norm_rms_eps(model.layernorm_epsilon)
    else:
        writer.add_layer_norm_eps(model.layernorm_epsilon)
    writer.add_rope_dimension_count(model.rotary_channels)
    writer.add_rope_freq_base(model.rotary_base)
    scaling = dict(model.rope_scaling or {"type": "none"})
    types = {
        "linear": gguf.RopeScalingType.LINEAR,
        "yarn": gguf.RopeScalingType.YARN,
        "longrope": gguf.RopeScalingType.LONGROPE,
    }
    writer.add_rope_scaling_type(types.get(scaling["type"], gguf.RopeScalingType.NONE))
    if scaling["type"] in ("linear", "yarn"):
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling["type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(int(scaling["original_max_position_embeddings"]))
    if scaling["type"] == "longrope":
        writer.add_rope_scaling_attn_factors(scaling["attention_factor"])
    if scaling["type"] == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(scaling["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(scaling["beta_slow"])
        # llama.cpp multiplies its own factor, YaRN's default, with this one.
        writer.add_rope_scaling_attn_factors(scaling["attention_factor"] / (1 + 0.1 * math.log(scaling["factor"])))


def _rope_factors(model: ModelConfig) -> dict[str, np.ndarray]:
    """{tensor: divisors of rotary frequencies, fp32 [kv_channels / 2]} of Llama 3.1's scaling or LongRoPE; {} without them."""
    scaling = model.rope_scaling or {}
    if scaling.get("type") == "longrope":
        kinds = ("long", "short")
        return {f"rope_factors_{kind}.weight": np.array(scaling[f"{kind}_factor"], dtype=np.float32) for kind in kinds}
    if scaling.get("type") != "llama3":
        return {}
    factors_I = llama3_factors(scaling, frequencies(model.rotary_base, model.kv_channels))
    return {"rope_freqs.weight": factors_I.float().numpy()}


def _permuted(name: str, tensor: torch.Tensor, size: int) -> torch.Tensor:
    """Query and key weights in the channel order of llama.cpp, which rotates neighbouring channels, not halves of a head.

    Other tensors are returned as they are. name: name in GGUF. size: channels of a head.
    """
    if ".attn_q." not in name and ".attn_k." not in name:
        return tensor
    tensor_NPI = tensor.unflatten(0, (-1, 2, size // 2))
    return tensor_NPI.transpose(1, 2).flatten(0, 2)


def _stored_type(shape: tuple[int, ...], kind: str) -> gguf.GGMLQuantizationType:
    """Type of a tensor: f32 for vectors, as llama.cpp needs; f16 for rows that the blocks of q8_0 do not divide; else `kind`."""
    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    stored = gguf.GGMLQuantizationType[kind.upper()]
    return gguf.GGMLQuantizationType.F16 if shape[-1] % gguf.GGML_QUANT_SIZES[stored][0] else stored


def _nbytes(shape: tuple[int, ...], stored: gguf.GGMLQuantizationType) -> int:
    """Bytes of a tensor in a type of GGUF."""
    block, size = gguf.GGML_QUANT_SIZES[stored]
    return math.prod(shape) // block * size


def _encode(name: str, tensor: torch.Tensor, stored: gguf.GGMLQuantizationType) -> np.ndarray:
    """Bytes of a tensor in its type. Raises FlextronError for a weight beyond the range of f16."""
    values = np.ascontiguousarray(tensor.numpy())
    if stored is gguf.GGMLQuantizationType.F16 and (largest := max(values.max(), -values.min())) > np.finfo(np.float16).max:
        raise FlextronError(
            f"gguf.type: {name} has a weight of {largest:.3g}, more than f16 holds (65504): use "
            "`flextron export format=gguf gguf.type=f32`"
        )
    return gguf.quants.quantize(values, stored)


def card(job: Job, file: Path, kind: str, vocabulary: Vocabulary | None) -> str:
    """Text of the exported directory's README.md.

    Args:
        job: the export.
        file: the GGUF file, already written.
        kind: type of the weight matrices: f32, f16 or q8_0.
        vocabulary: tokenizer in the file; None without.
    """
    parameters, full = count_parameters(job.info.model, job.net), count_parameters(job.info.model)
    costs = describe(replace(job, dtype="fp32" if kind == "f32" else "fp16")).splitlines()
    costs = [line for line in costs if not line.startswith("| weights |")]  # its bytes are those of 16 or 32 bits, not of q8_0
    if vocabulary is None:
        use = "Without a tokenizer, llama.cpp takes token ids, not text (`llama_cpp.Llama.eval`)."
    else:
        use = f'```bash\nllama-cli -m {file.name} -p "The" -n 20 -no-cnv\n```'
    return f"""---
pipeline_tag: text-generation
tags: [flextron, gguf]
---
# A Flextron sub-network

GGUF file for llama.cpp: {parameters:,} parameters, {parameters / full:.1%} of the {full:,} of the elastic model from which
flextron_mcore cut it. Weight matrices are in {kind}; the file has {file.stat().st_size:,} bytes.

{chr(10).join(costs)}

{use}
"""
