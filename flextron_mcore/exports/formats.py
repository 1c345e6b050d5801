"""Formats of exports. Each is a package or module of exports/ that defines FORMAT."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flextron_mcore.config import FlextronError
from flextron_mcore.settings.formats import GgufSettings, HfElasticSettings, HfSettings, TrtllmSettings
from flextron_mcore.space import SubNetwork

if TYPE_CHECKING:
    import torch

    from flextron_mcore.checkpoint.store import CheckpointInfo

FORMATS = {
    "hf": "flextron_mcore.exports.hf",
    "hf_elastic": "flextron_mcore.exports.hf_elastic",
    "trtllm": "flextron_mcore.exports.trtllm",
    "gguf": "flextron_mcore.exports.gguf",
    "megatron": "flextron_mcore.exports.megatron",
}


@dataclass(frozen=True)
class Job:
    """One run of `flextron export`: network, directory and settings. Raises FlextronError for a network outside of the space.

    Attributes:
        info: opened checkpoint.
        net: sub-network to export.
        out: existing directory; empty before `Format.write`, which checks it.
        dtype: precision of the weights: fp32, bf16 or fp16; None is replaced by the checkpoint's precision.
        max_shard_size: most bytes of one file of weights.
        tokenizer: tokenizer directory; None is replaced by the checkpoint's, and stays None if it has no tokenizer.
        progress: function (bytes) called for each tensor written; None: none.
        settings: settings of the format; None: defaults of the format.
        origin: selector and budget that chose the network, in words for the model card; None: not told there.
        token_routers: adaptive routers of the checkpoint, for hf_elastic: (description, tensors) (adaptive/export.py); None
            without.
        refitted: {name in the full model: weight or bias of the sub-network that replaces the slice of the full model's}; None
            for a plain slice.
        refit: how the tensors in `refitted` were made, in words for the model card; None for a plain slice.
    """

    info: CheckpointInfo
    net: SubNetwork
    out: Path
    dtype: str | None = None
    max_shard_size: int = 10**9
    tokenizer: Path | None = None
    progress: Callable[[int], None] | None = None
    settings: HfSettings | TrtllmSettings | GgufSettings | HfElasticSettings | None = None
    origin: str | None = None
    token_routers: tuple[dict[str, Any], dict[str, torch.Tensor]] | None = None
    refitted: Mapping[str, torch.Tensor] | None = None
    refit: str | None = None

    def __post_init__(self) -> None:
        self.info.space.check(self.info.model, self.net)
        object.__setattr__(self, "dtype", self.dtype or self.info.dtype)
        object.__setattr__(self, "tokenizer", self.tokenizer or self.info.tokenizer)


@dataclass(frozen=True)
class Format:
    """Format of an export: functions that write a directory and read it back.

    Attributes:
        write: function (job) that writes the export; called on all ranks. Returns a dictionary for metrics.json: format,
            architecture, parameters, bytes (size of all files), files (their number). Raises FlextronError for a model or network
            that the format cannot hold.
        logits: function (job, one of `networks`, tokens [batch, sequence]) that returns logits [batch, sequence, vocabulary] in
            fp32, computed from the written files only; called on the main process.
        tolerance: function (job) that returns the largest absolute difference from the checkpoint's logits that rounding
            explains.
        networks: function (job) that returns the networks whose logits are verified; by default the exported one.
        check: function (job) that raises those errors of `write` that need no weights, for what takes long before it.
    """

    write: Callable[[Job], dict[str, Any]]
    logits: Callable[[Job, SubNetwork, torch.Tensor], torch.Tensor]
    tolerance: Callable[[Job], float]
    networks: Callable[[Job], list[SubNetwork]] = lambda job: [job.net]
    check: Callable[[Job], object] = lambda job: None


def check_format(name: str) -> None:
    """Raise FlextronError for an unknown format."""
    if name not in FORMATS:
        raise FlextronError(f"format={name!r} is not known: use one of {', '.join(FORMATS)}")


def get_format(name: str) -> Format:
    """Import the module of the format `name`, a key of FORMATS, and return its FORMAT. Raises FlextronError for another name."""
    check_format(name)
    return importlib.import_module(FORMATS[name]).FORMAT


def rounding(job: Job) -> float:
    """Largest absolute difference between logits of the export and of the checkpoint that rounding explains.

    1e-4 for fp32 computation with the stored weights; 0.25 if weights are rounded to the export's 16-bit dtype, which happens
    when it differs from the checkpoint's, or when modulation or compensation was multiplied into the weights, or some were
    refitted.
    """
    space = job.info.space
    multiplied = space.compensation or (space.modulation and job.net != SubNetwork.full(job.info.model))
    as_stored = job.dtype == job.info.dtype and not (multiplied or job.refitted)
    return 1e-4 if as_stored or job.dtype == "fp32" else 0.25
