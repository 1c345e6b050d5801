"""Logits of a GGUF file of architecture `deci`, from the file alone, in fp32: what llama.cpp's graph computes.

Source: llama.cpp, src/models/deci.cpp, and ggml's RoPE of neighbouring channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, quants
from torch.nn import functional as F

from flextron_mcore.config import FlextronError
from flextron_mcore.exports.reference import Decoder, frequencies

_NAMES = {
    "words": "token_embd",
    "attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "projection": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "final_norm": "output_norm",
}


def forward(path: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary]. Raises FlextronError for a file that is not GGUF."""
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, LookupError) as error:  # what the reader and numpy raise on a damaged file
        raise FlextronError(f"{path}: not readable as GGUF: {' '.join(str(error).split())}") from None
    stored = {tensor.name: tensor for tensor in reader.tensors}  # the file is mapped: a tensor is in memory while it is used
    names = _NAMES | {"output": "output" if "output.weight" in stored else "token_embd"}

    def value(key: str, default: Any = None) -> Any:
        field = reader.fields.get(f"deci.{key}")
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
    decoder = Decoder(
        tensor,
        layers=value("block_count"),
        head_size=value("attention.key_length"),
        epsilon=value("attention.layer_norm_rms_epsilon"),
        rms_norm=True,
        activation=F.silu,
        frequency_I=frequency_I / value("rope.scaling.factor", 1.0),
        neighbours=True,
    )
    return decoder.logits(tokens_BS)
