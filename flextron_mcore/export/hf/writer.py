"""Write a Hugging Face directory: weights in shards, and the model card."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

from flextron_mcore.checkpoint.hf_import.common import INDEX_FILE, WEIGHTS_FILE
from flextron_mcore.checkpoint.writer import LazyTensor
from flextron_mcore.export.card import describe
from flextron_mcore.export.formats import Job
from flextron_mcore.export.hf.target import Part
from flextron_mcore.runtime.disk import forget
from flextron_mcore.runtime.ranks import place, wait_for_all
from flextron_mcore.space import count_parameters

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write an object, two spaces a level."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_weights(
    out: Path,
    parts: Sequence[Part],
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    max_shard_size: int,
    progress: Callable[[int], None] | None,
) -> int:
    """Write `tensors` (Megatron-Core's names) as the Hugging Face tensors of `parts`; returns the number of parameters.

    One file, or shards of at most max_shard_size bytes with an index. Call on all ranks: they share the shards. Each holds two
    tensors in memory at a time, one being read while the other is written. A Megatron-Core tensor is read once: what becomes of
    it goes into one shard. progress is called with the bytes of each, scaled to the rank's share.
    """
    rank, ranks = place()
    shards = _plan(parts, dtype, max_shard_size)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS_FILE]
    sizes = [sum(_numel(part) for part in shard) for shard in shards]
    parameters, share = sum(sizes), sum(sizes[rank::ranks])
    with ThreadPoolExecutor(1) as writer:
        for name, shard in list(zip(names, shards, strict=True))[rank::ranks]:
            header, begins = _layout({key: shape for part in shard for key, shape in part.shapes.items()}, dtype)
            with (out / name).open("wb") as file:
                file.write(header)
                writing: Future[None] | None = None
                for part in shard:
                    whole = tensors[part.source].load().to(dtype)
                    pieces: dict[int, torch.Tensor] = {}
                    for (key, shape), tensor in zip(part.shapes.items(), part.split(whole), strict=True):
                        if tuple(tensor.shape) != shape:
                            raise AssertionError(f"{key}: {tuple(tensor.shape)} instead of {shape}")
                        pieces[begins[key]] = tensor.contiguous()
                    if writing:
                        writing.result()
                    writing = writer.submit(_write, file, pieces)
                    if progress:
                        progress(whole.nbytes * parameters // share)
                writing.result()
    if len(shards) > 1 and rank == 0:
        metadata = {"total_size": parameters * dtype.itemsize, "total_parameters": parameters}
        index = {key: name for name, shard in zip(names, shards, strict=True) for part in shard for key in part.shapes}
        write_json(out / INDEX_FILE, {"metadata": metadata, "weight_map": index})
    wait_for_all()
    return parameters


def _layout(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file, and where each tensor begins in it.

    It is what the library writes, which wants all tensors in memory at once.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for key, shape in sorted(shapes.items()):
        begins[key], end = end, end + dtype.itemsize * math.prod(shape)
        entries[key] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begins[key], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {key: len(header) + begin for key, begin in begins.items()}


def _write(file: BinaryIO, pieces: Mapping[int, torch.Tensor]) -> None:
    """Contiguous tensors, each where it begins, to the disk."""
    for begin, tensor in pieces.items():
        file.seek(begin)
        file.write(tensor.flatten().view(torch.uint8).numpy())
    file.flush()
    forget(file.name)


def _numel(part: Part) -> int:
    return sum(map(math.prod, part.shapes.values()))


def _plan(parts: Sequence[Part], dtype: torch.dtype, max_shard_size: int) -> list[list[Part]]:
    """Parts in order, a new shard where the next does not fit."""
    shards: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        size = dtype.itemsize * _numel(part)
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += size
    return shards


def model_card(job: Job, architecture: str) -> str:
    """README.md of an export of the class `architecture`."""
    custom = architecture.startswith("Flextron")
    trust = ", trust_remote_code=True" if custom else ""
    parameters, full = count_parameters(job.info.model, job.net), count_parameters(job.info.model)
    code = (
        "Its layers are transformers' own, each with the widths that `per_layer_config` gives; the Python files here only say so."
        if custom
        else "It is a stock model: no code comes with it."
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [flextron]
---
# A Flextron sub-network

`{architecture}`: {parameters:,} parameters in {job.dtype}, {parameters / full:.1%} of the {full:,} of the elastic model that
flextron_mcore cut it from. {code}

{describe(job)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})
model = AutoModelForCausalLM.from_pretrained("PATH"{trust})
prompt = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
```
"""
