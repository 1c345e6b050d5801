"""Import Hugging Face checkpoints of the families that `families/` declares."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flextron_mcore.checkpoint.parts import join
from flextron_mcore.checkpoint.reader import DTYPES
from flextron_mcore.checkpoint.safetensor_files import StoredTensor, open_weights, read_json
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.checkpoint.writer import LazyTensor
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families import family_of_config
from flextron_mcore.families.family import Mapped
from flextron_mcore.families.tensors import of_network
from flextron_mcore.space import ElasticSpace, SubNetwork

_VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENIZER_FILES = (
    *_VOCABULARY_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
)


@dataclass(frozen=True)
class HFCheckpoint:
    """An opened Hugging Face directory whose weights are all there, of the shapes its config gives.

    config: config.json. tensors: Megatron-Core's tensors, by what they are stored as. sources: where these lie in its files.
    dtype: fp32, bf16 or fp16, wide enough for every weight.
    """

    path: Path
    config: Mapping[str, Any]
    model: ModelConfig
    tensors: tuple[Mapped, ...]
    sources: Mapping[str, StoredTensor]
    dtype: str


def open_hf(path: str | Path) -> HFCheckpoint:
    """Read config.json and the headers of the weights in the directory `path`; no weight is read.

    Raises FlextronError for a directory, file, architecture, option or tensor that is missing, damaged or unsupported, and for a
    stored tensor that the family does not declare: the model would compute something else without it.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FlextronError(f"hf={path}: no such directory")
    file = path / "config.json"
    config = read_json(file)
    try:
        family = family_of_config(config)
        model = family.model_config(config)
    except FlextronError as error:
        raise FlextronError(f"{file}: {error}") from None
    stored = {name.removeprefix(family.prefix): tensor for name, tensor in open_weights(path).items()}
    full = SubNetwork.full(model)
    tensors = family.names.map(of_network(model, full, full), family.architecture)
    sources: dict[str, StoredTensor] = {}
    for name, shape in (pair for mapped in tensors for pair in mapped.shapes.items()):
        tensor = stored.pop(name.removeprefix(family.prefix), None)
        if tensor is None:
            raise FlextronError(f"{path}: the weights lack the tensor {name}")
        if tensor.shape != shape:
            raise FlextronError(
                f"{tensor.file}: tensor {name} has the shape {list(tensor.shape)}, "
                f"config.json gives {list(shape)}: the two are not of the same model"
            )
        sources[name] = tensor
    # A tied output layer may be stored a second time; transformers does not read it either.
    unknown = sorted(name for name in stored if name != "lm_head.weight" and not family.ignored.search(name))
    if unknown:
        raise FlextronError(
            f"{stored[unknown[0]].file}: holds {len(unknown)} tensor(s) that a {family.architecture} of this config.json lacks "
            f"and that would be lost: {', '.join(unknown[:5])}"
        )
    dtype = functools.reduce(torch.promote_types, [tensor.torch_dtype for tensor in sources.values()])
    return HFCheckpoint(path, config, model, tuple(tensors), sources, _name(dtype))


def import_hf(
    source: str | Path | HFCheckpoint, space: Mapping[str, Any] | None = None, dtype: str | None = None
) -> tuple[CheckpointInfo, dict[str, LazyTensor]]:
    """A Hugging Face checkpoint as an elastic one in identity order: unit i of Hugging Face is sorted unit i.

    space: the elastic space's plain form (ElasticSpace.build's arguments). dtype: fp32, bf16 or fp16; default: as stored, the
    widest if mixed. The tensors, for `store.write_streaming`, are read when loaded, each alone.
    """
    hf = source if isinstance(source, HFCheckpoint) else open_hf(source)
    dtype = dtype or hf.dtype
    if dtype not in DTYPES:
        raise FlextronError(f"dtype={dtype!r} is not known: use one of {', '.join(DTYPES)}")
    info = CheckpointInfo(hf.model, ElasticSpace.from_dict(hf.model, space or {}), dtype, hf_config=dict(hf.config))
    tensors = {
        mapped.placed.name: LazyTensor(mapped.placed.shape, DTYPES[dtype], functools.partial(_load, hf, mapped, DTYPES[dtype]))
        for mapped in hf.tensors
    }
    return info, tensors


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer (and generation_config.json) of a Hugging Face directory into `target`, made if need be.

    Returns whether there is one; without it nothing is copied.
    """
    if not any((source / name).is_file() for name in _VOCABULARY_FILES):
        return False
    target.mkdir(parents=True, exist_ok=True)
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
    return True


def _load(hf: HFCheckpoint, mapped: Mapped, dtype: torch.dtype) -> torch.Tensor:
    return join(mapped, *(hf.sources[name].read() for name in mapped.shapes)).to(dtype)


def _name(dtype: torch.dtype) -> str:
    """Our name of a dtype; float64, which Megatron-Core does not train, becomes fp32."""
    return next((name for name, known in DTYPES.items() if known == dtype), "fp32")
