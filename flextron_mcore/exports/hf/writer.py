"""Weights in shards, and the model card, of a Hugging Face directory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from flextron_mcore.checkpoint.parts import split
from flextron_mcore.checkpoint.precision import converted
from flextron_mcore.checkpoint.safetensor_files import INDEX_FILE, WEIGHTS_FILE, TensorFile
from flextron_mcore.checkpoint.writer import LazyTensor
from flextron_mcore.exports.card import describe
from flextron_mcore.exports.directory import write_json
from flextron_mcore.exports.formats import Job
from flextron_mcore.families.family import Mapped
from flextron_mcore.runtime.ranks import place, wait_for_all
from flextron_mcore.space import count_parameters


def write_weights(
    out: Path,
    mapped: Sequence[Mapped],
    tensors: Mapping[str, LazyTensor],
    dtype: torch.dtype,
    max_shard_size: int,
    progress: Callable[[int], None] | None,
) -> int:
    """Write weights as safetensors: one file, or shards with an index. Call on all ranks, which share the shards.

    Two tensors are in memory at a time: one is read while the other is written. Hugging Face tensors of one Megatron-Core tensor
    go into the same shard.

    Args:
        out: directory to write into.
        mapped: tensors in Megatron-Core's form with their Hugging Face names and shapes, in the order of the files.
        tensors: {Megatron-Core's name: tensor}.
        dtype: dtype of the files.
        max_shard_size: most bytes of one shard.
        progress: function (bytes) called for each tensor that this rank writes. Bytes are scaled, so that one rank's calls add up
            to all bytes. None: none.

    Returns:
        Number of parameters of all shards.
    """
    rank, ranks = place()
    shards = _plan(mapped, dtype, max_shard_size)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [WEIGHTS_FILE]
    sizes = [sum(map(_numel, shard)) for shard in shards]
    parameters, share = sum(sizes), sum(sizes[rank::ranks])
    with ThreadPoolExecutor(1) as writer:
        for name, shard in list(zip(names, shards, strict=True))[rank::ranks]:
            shapes = {key: shape for each in shard for key, shape in each.shapes.items()}
            with TensorFile(out / name, shapes, dtype) as file:
                writing: Future[None] | None = None
                for each in shard:
                    whole = converted(tensors[each.placed.name].load(), dtype, f"tensor {each.placed.name}")
                    pieces = {k: part.contiguous() for k, part in zip(each.shapes, split(each, whole), strict=True)}
                    if writing:
                        writing.result()
                    writing = writer.submit(file.write, pieces)
                    if progress:
                        progress(whole.nbytes * parameters // share)
                writing.result()
    if len(shards) > 1 and rank == 0:
        metadata = {"total_size": parameters * dtype.itemsize, "total_parameters": parameters}
        index = {key: name for name, shard in zip(names, shards, strict=True) for each in shard for key in each.shapes}
        write_json(out / INDEX_FILE, {"metadata": metadata, "weight_map": index})
    wait_for_all()
    return parameters


def _numel(mapped: Mapped) -> int:
    """Number of elements of all Hugging Face tensors of one Megatron-Core tensor."""
    return sum(map(math.prod, mapped.shapes.values()))


def _plan(mapped: Sequence[Mapped], dtype: torch.dtype, max_shard_size: int) -> list[list[Mapped]]:
    """Divide tensors into shards: a list of tensors for each, in order. A tensor that does not fit begins a new shard.

    Args:
        mapped: tensors, in the order of the files.
        dtype: dtype of the files.
        max_shard_size: most bytes of one shard; a larger tensor has a shard of its own.
    """
    shards: list[list[Mapped]] = [[]]
    filled = 0
    for each in mapped:
        size = dtype.itemsize * _numel(each)
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(each)
        filled += size
    return shards


def model_card(job: Job, architecture: str, written: int) -> str:
    """Text of the exported directory's README.md.

    Args:
        job: the export.
        architecture: class of the exported model.
        written: number of parameters in the files, zeros of padding included.
    """
    custom = architecture.startswith(("Flextron", "DeciLM"))
    trust = ", trust_remote_code=True" if custom else ""
    parameters, full = count_parameters(job.info.model, job.net), count_parameters(job.info.model)
    code = (
        "Its layers are transformers' own, each with the widths in config.json; the Python files here only build them."
        if custom
        else "It is a stock model of transformers, without code of its own."
    )
    extra = written - parameters
    padding = f" Zeros that its class needs add {extra:,} parameters ({extra / parameters:.1%})." if extra else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [flextron]
---
# A Flextron sub-network

`{architecture}`: {parameters:,} parameters in {job.dtype}, {parameters / full:.1%} of the {full:,} of the elastic model
from which flextron_mcore cut it. {code}{padding}

{describe(job)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH"{trust})
model = AutoModelForCausalLM.from_pretrained("PATH"{trust})
prompt = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
```
"""
