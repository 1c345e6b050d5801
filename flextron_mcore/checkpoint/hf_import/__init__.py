"""Import Hugging Face checkpoints. A family of models is one file here that ends in a `Family`, listed in FAMILIES."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flextron_mcore.checkpoint.hf_import import gpt2, llama
from flextron_mcore.checkpoint.hf_import.common import Family, Recipe, StoredTensor, open_weights, read_json
from flextron_mcore.checkpoint.reader import DTYPES
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.checkpoint.writer import LazyTensor
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import ElasticSpace

FAMILIES = (llama.FAMILY, gpt2.FAMILY)
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

    config: config.json. recipes: Megatron-Core name -> how it is made. sources: the tensors that recipes name, in its files.
    dtype: fp32, bf16 or fp16, wide enough for every weight. unused: stored tensors that the model has no place for.
    """

    path: Path
    config: Mapping[str, Any]
    model: ModelConfig
    recipes: Mapping[str, Recipe]
    sources: Mapping[str, StoredTensor]
    dtype: str
    unused: tuple[str, ...]


def open_hf(path: str | Path) -> HFCheckpoint:
    """Read config.json and the headers of the weights in the directory `path`; no weight is read.

    Raises FlextronError for a directory, file, architecture, option or tensor that is missing, damaged or unsupported.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise FlextronError(f"hf={path}: no such directory")
    file = path / "config.json"
    config = read_json(file)
    try:
        family = _family(config)
        model = family.model_config(config)
    except FlextronError as error:
        raise FlextronError(f"{file}: {error}") from None
    stored = {name.removeprefix(family.prefix): tensor for name, tensor in open_weights(path).items()}
    recipes = family.recipes(model)
    sources: dict[str, StoredTensor] = {}
    for recipe in recipes.values():
        for name, shape in recipe.sources.items():
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
    unused = sorted(name for name in stored if name != "lm_head.weight" and not family.ignored.search(name))
    dtype = functools.reduce(torch.promote_types, [tensor.torch_dtype for tensor in sources.values()])
    return HFCheckpoint(path, config, model, recipes, sources, _name(dtype), tuple(unused))


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
        key: LazyTensor(recipe.shape, DTYPES[dtype], functools.partial(_load, hf, recipe, DTYPES[dtype]))
        for key, recipe in hf.recipes.items()
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


def _load(hf: HFCheckpoint, recipe: Recipe, dtype: torch.dtype) -> torch.Tensor:
    return recipe.join(*(hf.sources[name].read() for name in recipe.sources)).to(dtype)


def _family(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by its first architecture, or by its model type if it names none."""
    if config.get("quantization_config"):
        raise FlextronError("quantized models are not supported: import the original")
    architectures, model_type = config.get("architectures"), config.get("model_type")
    for family in FAMILIES:
        if family.architecture in architectures if isinstance(architectures, list) else family.model_type == model_type:
            return family
    shown = (
        f"architecture {', '.join(map(str, architectures))}" if isinstance(architectures, list) else f"model_type {model_type!r}"
    )
    raise FlextronError(f"{shown} is not supported: only {', '.join(family.architecture for family in FAMILIES)}")


def _name(dtype: torch.dtype) -> str:
    """Our name of a dtype; float64, which Megatron-Core does not train, becomes fp32."""
    return next((name for name, known in DTYPES.items() if known == dtype), "fp32")
