"""The forms that a sub-network can be exported in. Each is a package or module here with a `FORMAT`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flextron_mcore.config import FlextronError
from flextron_mcore.settings.stages import GgufSettings, HfElasticSettings, TrtllmSettings
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
    """One export.

    out: an existing, empty directory. dtype: fp32, bf16 or fp16; default: the checkpoint's. max_shard_size: bytes of one weights
    file. tokenizer: a directory; default: the one beside the checkpoint. progress: called with the bytes of each tensor written.
    settings: the format's own; default: its schema's. origin: what chose the network, for the model card. token_routers: of
    hf_elastic, the checkpoint's adaptive routers: description for its table, and tensors (adaptive/export.py).
    """

    info: CheckpointInfo
    net: SubNetwork
    out: Path
    dtype: str | None = None
    max_shard_size: int = 10**9
    tokenizer: Path | None = None
    progress: Callable[[int], None] | None = None
    settings: TrtllmSettings | GgufSettings | HfElasticSettings | None = None
    origin: str | None = None
    token_routers: tuple[dict[str, Any], dict[str, torch.Tensor]] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", self.dtype or self.info.dtype)
        object.__setattr__(self, "tokenizer", self.tokenizer or self.info.tokenizer)


@dataclass(frozen=True)
class Format:
    """A form of export: writes a directory and reads it back.

    write: on all ranks; returns format, architecture, parameters, bytes, files. Raises FlextronError for what it cannot hold.
    logits: (job, one of `networks`, tokens [batch, sequence]) -> logits [batch, sequence, vocabulary] in fp32, computed from
        what was written and nothing else; on the main process.
    tolerance: the largest difference from the checkpoint's logits that rounding explains.
    networks: which of them `logits` is asked for.
    """

    write: Callable[[Job], dict[str, Any]]
    logits: Callable[[Job, SubNetwork, torch.Tensor], torch.Tensor]
    tolerance: Callable[[Job], float]
    networks: Callable[[Job], list[SubNetwork]] = lambda job: [job.net]


def check_format(name: str) -> None:
    """Raises FlextronError for a format that there is not."""
    if name not in FORMATS:
        raise FlextronError(f"format={name!r} is not known: use one of {', '.join(FORMATS)}")


def get_format(name: str) -> Format:
    """The format called `name`. Raises FlextronError."""
    check_format(name)
    return importlib.import_module(FORMATS[name]).FORMAT


def rounding(job: Job) -> float:
    """Largest difference of logits that rounding explains: of fp32, or of the export's dtype.

    Weights are not rounded where they are the checkpoint's own, in its dtype: that is, where no modulation was multiplied in.
    """
    as_stored = job.dtype == job.info.dtype and not (job.info.space.modulation and job.net != SubNetwork.full(job.info.model))
    return 1e-4 if as_stored or job.dtype == "fp32" else 0.25
