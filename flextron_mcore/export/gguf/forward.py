"""Logits of a GGUF file of architecture `deci`, from the file alone, in fp32: what llama.cpp's graph computes, step by step.

Shape suffixes: B batch, S sequence, C hidden channels, N heads, H channels of a head, I half of them, V vocabulary.
Source: llama.cpp, src/models/deci.cpp, and ggml's RoPE of neighbouring channels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from flextron_mcore.config import FlextronError


class _File:
    """Metadata and tensors of a file, which is mapped: a tensor is in memory while it is used."""

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        try:
            reader = GGUFReader(path)
        except (OSError, ValueError, LookupError) as error:  # what the reader and numpy raise on a damaged file
            raise FlextronError(f"{path}: not readable as GGUF: {' '.join(str(error).split())}") from None
        self.fields, self.tensors = reader.fields, {tensor.name: tensor for tensor in reader.tensors}

    def value(self, key: str, default: Any = None) -> Any:
        """Of a key of the architecture."""
        field = self.fields.get(f"deci.{key}")
        return default if field is None else field.contents()

    def tensor(self, name: str) -> torch.Tensor | None:
        """In fp32; None where there is none of that name."""
        from gguf import quants

        if name not in self.tensors:
            return None
        found = self.tensors[name]
        return torch.from_numpy(np.array(quants.dequantize(found.data, found.tensor_type), dtype=np.float32))

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """`x` times a weight, plus its bias if there is one."""
        return F.linear(x, self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias"))

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """RMSNorm over the last dimension."""
        weight = self.tensor(f"{name}.weight")
        return F.rms_norm(x, weight.shape, weight, self.value("attention.layer_norm_rms_epsilon"))


@torch.no_grad()
def forward(path: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary]. Raises FlextronError for a file that is not GGUF."""
    file = _File(path)
    table = file.tensor("token_embd.weight")
    x_BSC = table[tokens_BS]
    del table
    turn_SI = _rotation(file, tokens_BS.shape[1])
    heads, groups = file.value("attention.head_count"), file.value("attention.head_count_kv")
    for i in range(file.value("block_count")):
        x_BSC = x_BSC + _attention(file, file.norm(x_BSC, f"blk.{i}.attn_norm"), f"blk.{i}.attn_", heads[i], groups[i], turn_SI)
        y_BSC = file.norm(x_BSC, f"blk.{i}.ffn_norm")
        gated = F.silu(file.linear(y_BSC, f"blk.{i}.ffn_gate")) * file.linear(y_BSC, f"blk.{i}.ffn_up")
        x_BSC = x_BSC + file.linear(gated, f"blk.{i}.ffn_down")
    output = "output" if "output.weight" in file.tensors else "token_embd"
    return file.linear(file.norm(x_BSC, "output_norm"), output)


def _rotation(file: _File, length: int) -> torch.Tensor:
    """Complex rotation of each pair of channels at each position [sequence, half a head]."""
    size = file.value("rope.dimension_count")
    frequency_I = file.value("rope.freq_base") ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    factors_I = file.tensor("rope_freqs.weight")
    if factors_I is not None:
        frequency_I = frequency_I / factors_I
    angle_SI = torch.outer(torch.arange(length, dtype=torch.float64), frequency_I / file.value("rope.scaling.factor", 1.0))
    return torch.polar(torch.ones_like(angle_SI), angle_SI).to(torch.complex64)


def _attention(file: _File, x_BSC: torch.Tensor, name: str, heads: int, groups: int, turn_SI: torch.Tensor) -> torch.Tensor:
    """Causal attention of one layer, `groups` keys and values for `heads` queries."""

    def split(part: str, count: int) -> torch.Tensor:
        return file.linear(x_BSC, name + part).unflatten(-1, (count, file.value("attention.key_length"))).transpose(1, 2)

    def rotate(x_BNSH: torch.Tensor) -> torch.Tensor:
        pairs_BNSI = torch.view_as_complex(x_BNSH.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs_BNSI * turn_SI).flatten(-2)

    query_BNSH, key_BNSH, value_BNSH = rotate(split("q", heads)), rotate(split("k", groups)), split("v", groups)
    mixed_BNSH = F.scaled_dot_product_attention(query_BNSH, key_BNSH, value_BNSH, is_causal=True, enable_gqa=True)
    return file.linear(mixed_BNSH.transpose(1, 2).flatten(2), name + "output")
