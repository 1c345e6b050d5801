"""Logits of a GGUF file, computed in fp32 from the file alone as in llama.cpp's graphs of `deci`, `qwen3` and `nemotron`.

Sources: llama.cpp, src/models/{deci,qwen3,nemotron}.cpp, and ggml's RoPE of neighbouring channels.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, quants
from torch.nn import functional as F

from flextron_mcore.config import FlextronError
from flextron_mcore.exports.reference import Decoder, frequencies, yarn_factors

_NAMES = {
    "words": "token_embd",
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "projection": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "final_norm": "output_norm",
}


def forward(path: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] in fp32 of tokens [batch, sequence]. Raises FlextronError for a damaged file."""
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, LookupError) as error:  # raised by the reader and by numpy for a damaged file
        raise FlextronError(f"{path}: not readable as GGUF: {' '.join(str(error).split())}: export again") from None
    stored = {tensor.name: tensor for tensor in reader.tensors}  # memory-mapped: read only when used
    names = _NAMES | {"output": "output" if "output.weight" in stored else "token_embd"}
    gated = "blk.0.ffn_gate.weight" in stored
    if not gated:
        names |= {"gate": "ffn_up", "up": "ffn_gate"}

    architecture = reader.fields["general.architecture"].contents()

    def value(key: str, default: Any = None) -> Any:
        field = reader.fields.get(f"{architecture}.{key}")
        return default if field is None else field.contents()

    def read(name: str) -> torch.Tensor | None:
        if name not in stored:
            return None
        found = stored[name]
        return torch.from_numpy(np.array(quants.dequantize(found.data, found.tensor_type), dtype=np.float32))

    def tensor(role: str) -> torch.Tensor | None:
        *layer, name, kind = role.split(".")
        return read("".join(f"blk.{i}." for i in layer) + f"{names[name]}.{kind}")

    frequency_I, factors_I = frequencies(value("rope.freq_base"), value("rope.dimension_count")), read("rope_freqs.weight")
    if factors_I is not None:
        frequency_I = frequency_I / factors_I
    factor, turn_scale = value("rope.scaling.factor", 1.0), 1.0
    if value("rope.scaling.type") == "yarn":
        scaling = {
            "factor": factor,
            "original_max_position_embeddings": value("rope.scaling.original_context_length"),
            "beta_fast": value("rope.scaling.yarn_beta_fast", 32.0),
            "beta_slow": value("rope.scaling.yarn_beta_slow", 1.0),
        }
        frequency_I = frequency_I / yarn_factors(scaling, frequency_I, value("rope.freq_base"))
        turn_scale = value("rope.scaling.attn_factor", 1.0) * (1 + 0.1 * math.log(factor))
        factor = 1.0
    if value("rope.scaling.type") == "longrope":  # llama.cpp compares its context (-c); here this is as long as the texts
        side = "long" if tokens_BS.shape[1] > value("rope.scaling.original_context_length") else "short"
        frequency_I, turn_scale = frequency_I / read(f"rope_factors_{side}.weight"), value("rope.scaling.attn_factor", 1.0)
    decoder = Decoder(
        tensor,
        layers=value("block_count"),
        head_size=value("attention.key_length"),
        epsilon=value("attention.layer_norm_rms_epsilon", value("attention.layer_norm_epsilon")),
        rms_norm=gated,
        activation=F.silu if gated else lambda x: F.relu(x).square(),
        frequency_I=frequency_I / factor,
        neighbours=architecture == "deci",
        turn_scale=turn_scale,
    )
    return decoder.logits(tokens_BS)
