"""Import of Hugging Face checkpoints, for the model families that `families/` declares."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flextron_mcore.checkpoint.downloads import check_download
from flextron_mcore.checkpoint.parts import join
from flextron_mcore.checkpoint.precision import converted
from flextron_mcore.checkpoint.reader import DTYPES
from flextron_mcore.checkpoint.safetensor_files import StoredTensor, open_weights
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.checkpoint.writer import LazyTensor
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.digests import check_files
from flextron_mcore.families.directory import check_directory, read_config
from flextron_mcore.families.family import Family, Mapped
from flextron_mcore.families.tensors import of_network
from flextron_mcore.files import expanded
from flextron_mcore.runtime.ranks import is_main_process
from flextron_mcore.space import ElasticSpace, SubNetwork

_ADAPTER = "adapter_config.json"  # with it transformers loads the adapter, where peft is installed


@dataclass(frozen=True)
class HFCheckpoint:
    """Opened Hugging Face directory, checked to hold all weights in the shapes that its config.json gives.

    Attributes:
        path: the directory.
        config: content of config.json, without keys that name code.
        family: model family that declares how tensors are converted.
        model: architecture.
        tensors: tensors in Megatron-Core's form, each with names and shapes of the Hugging Face tensors that it is made of.
        sources: {Hugging Face name: tensor in a file}.
        dtype: precision of most weights: fp32, bf16 or fp16.
        tied: False if config.json ties the output layer to the embedding, but the files hold an output layer that differs from
            the embedding; `model` then has an output layer of its own.
    """

    path: Path
    config: Mapping[str, Any]
    family: Family
    model: ModelConfig
    tensors: tuple[Mapped, ...]
    sources: Mapping[str, StoredTensor]
    dtype: str
    tied: bool = True

    def resized(self, vocab_size: int) -> HFCheckpoint:
        """Checkpoint with a larger vocabulary. New rows of embedding and output layer are the mean of the old.

        vocab_size: number of tokens, at least the present one.

        transformers' resize_token_embeddings instead draws new rows from a normal distribution around this mean, with 1e-9 times
        the covariance of the old rows.
        """
        model = replace(self.model, vocab_size=vocab_size)
        full = SubNetwork.full(model)
        tensors = self.family.names.map(of_network(model, full, full), self.family.architecture)
        return replace(self, model=model, tensors=tuple(tensors))

    def stored_otherwise(self, dtype: str) -> list[str]:
        """Hugging Face names of the tensors whose dtype holds values that `dtype` must round. dtype: fp32, bf16 or fp16."""
        kept = DTYPES[dtype]
        return [name for name, tensor in self.sources.items() if torch.promote_types(tensor.torch_dtype, kept) != kept]


def open_hf(path: str | Path) -> HFCheckpoint:
    """Open a Hugging Face directory: read config.json and the headers of the weights, and check them against each other.

    Files are compared with the checksums that their download left, if it left some (downloads.py), and files that `flextron
    export` wrote with its digests. Of the tensors only one is read: an output layer that is stored although config.json ties it
    to the embedding. If it differs from the embedding, the model is untied, as in transformers.

    Raises FlextronError for a directory, file, architecture, option or tensor that is missing, damaged or unsupported, and for a
    stored tensor that the family does not declare, because without it the model would compute something else.
    """
    path = expanded(path)
    check_directory(path)
    if (adapter := path / _ADAPTER).is_file():
        raise FlextronError(
            f"{adapter}: an adapter is not applied: merge it into the model, with peft's merge_and_unload, or remove this file"
        )
    own = [each.name for each in path.iterdir() if each.suffix != ".safetensors"]
    check_files(path, *own)  # of a directory that `flextron export` wrote
    config, family, model = read_config(path)
    stored: dict[str, StoredTensor] = {}
    for name, tensor in open_weights(path).items():
        bare = name.removeprefix(family.prefix)
        if bare in stored:
            raise FlextronError(
                f"{tensor.file}: holds {bare} with and without the prefix {family.prefix}: remove the one that is not the model's"
            )
        stored[bare] = tensor
    shared = model.share_embeddings_and_output_weights
    model = _tied(family, model, stored)
    full = SubNetwork.full(model)
    tensors = family.names.map(of_network(model, full, full), family.architecture)
    sources: dict[str, StoredTensor] = {}
    for name, shape in (pair for mapped in tensors for pair in mapped.shapes.items()):
        tensor = stored.pop(name.removeprefix(family.prefix), None)
        if tensor is None:
            raise FlextronError(f"{path}: the weights lack the tensor {name}, which this config.json needs: download both again")
        if tensor.shape != shape:
            raise FlextronError(
                f"{tensor.file}: tensor {name} has the shape {list(tensor.shape)}, "
                f"config.json gives {list(shape)}: the two are not of the same model: download both again"
            )
        sources[name] = tensor
    unknown = sorted(name for name in stored if not family.ignored.search(name))
    if unknown:
        raise FlextronError(
            f"{stored[unknown[0]].file}: holds {len(unknown)} tensor(s) that a {family.architecture} of this config.json lacks "
            f"and that would be lost: {', '.join(unknown[:5])}: such a model is not supported"
        )
    if is_main_process():
        check_download([*(path / name for name in own), *{tensor.file for tensor in sources.values()}])
    sizes: Counter[torch.dtype] = Counter()
    for tensor in sources.values():
        sizes[tensor.torch_dtype] += math.prod(tensor.shape)
    tied = model.share_embeddings_and_output_weights == shared
    return HFCheckpoint(path, config, family, model, tuple(tensors), sources, _name(sizes.most_common(1)[0][0]), tied)


def import_hf(
    source: str | Path | HFCheckpoint, space: Mapping[str, Any] | None = None, dtype: str | None = None
) -> tuple[CheckpointInfo, dict[str, LazyTensor]]:
    """Describe a Hugging Face checkpoint as an elastic one, with tensors to write. Neurons, heads and channels keep their order.

    Args:
        source: Hugging Face directory, or the result of `open_hf`.
        space: {axis: candidates} and further arguments of ElasticSpace.build; None: the default space.
        dtype: precision of the written weights, "fp32", "bf16" or "fp16"; None: the stored precision of most weights.

    Returns:
        Description of the checkpoint, and {name: tensor} for `write_streaming`, which reads each tensor when it writes it.

    Raises:
        FlextronError: the directory is missing, damaged or of an unsupported model, the dtype is unknown, or candidates of the
            space do not fit the model. Reading a tensor raises it for weights that are not finite in the dtype.
    """
    hf = source if isinstance(source, HFCheckpoint) else open_hf(source)
    dtype = dtype or hf.dtype
    if dtype not in DTYPES:
        raise FlextronError(f"dtype={dtype!r} is not known: use one of {', '.join(DTYPES)}")
    config = {**hf.config, "_name_or_path": hf.config.get("_name_or_path") or hf.path.resolve().name}
    info = CheckpointInfo(hf.model, ElasticSpace.from_dict(hf.model, space or {}), dtype, hf_config=config)
    tensors = {
        mapped.placed.name: LazyTensor(mapped.placed.shape, DTYPES[dtype], functools.partial(_load, hf, mapped, DTYPES[dtype]))
        for mapped in hf.tensors
    }
    return info, tensors


def _load(hf: HFCheckpoint, mapped: Mapped, dtype: torch.dtype) -> torch.Tensor:
    """Read a tensor in Megatron-Core's form, made of the Hugging Face tensors that `mapped` names, in `dtype`."""
    sources = {name: hf.sources[name] for name in mapped.shapes}
    read = (converted(tensor.read(), dtype, f"{tensor.file}: tensor {name}") for name, tensor in sources.items())
    tensor = join(mapped, *read)
    missing = mapped.placed.shape[0] - tensor.shape[0]
    if missing > 0:  # a resized vocabulary
        mean = tensor.float().mean(0, keepdim=True).to(dtype)
        tensor = torch.cat([tensor, mean.expand(missing, -1)])
    return tensor


def _tied(family: Family, model: ModelConfig, stored: dict[str, StoredTensor]) -> ModelConfig:
    """Architecture with embedding and output layer tied or untied as transformers loads them.

    A tied model keeps one of the two tensors in `stored`, under the embedding's name.

    Args:
        family: family of the model.
        model: architecture in config.json.
        stored: {name without the family's prefix: tensor}; changed in place.
    """
    if not model.share_embeddings_and_output_weights:
        return model
    embedding, head = (
        f"{family.names.modules[module]}.weight".removeprefix(family.prefix)
        for module in ("embedding.word_embeddings", "output_layer")
    )
    if embedding in stored and head in stored:
        if not _equal(stored[embedding], stored[head]):
            return replace(model, share_embeddings_and_output_weights=False)
        del stored[head]
    elif head in stored:
        stored[embedding] = stored.pop(head)
    return model


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """True if two stored tensors have the same shape and values. Reads them part by part, until a part differs."""
    if one.shape != other.shape:
        return False
    pairs = zip(one.read_parts(), other.read_parts(), strict=True)
    return all(torch.equal(a.double(), b.double()) for a, b in pairs)


def _name(dtype: torch.dtype) -> str:
    """Name of a dtype: fp32, bf16 or fp16. float64 becomes fp32, because Megatron-Core does not train it."""
    return next((name for name, known in DTYPES.items() if known == dtype), "fp32")
