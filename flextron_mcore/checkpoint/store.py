"""Checkpoint directories: their description, how they are found and opened. No torch import.

A checkpoint is a directory in Megatron-Core's torch_dist format with vanilla keys and shapes, plus `flextron.json`, its
description. A run keeps checkpoints as `RUN/checkpoints/iter_0000100` and its tokenizer as `RUN/tokenizer`. A checkpoint is
written to `RUN/checkpoints/.iter_0000100.tmp` and renamed when it is complete. checkpoint/reader.py reads tensors,
checkpoint/writer.py writes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flextron_mcore import digests
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.files import check_folder, explain, read_json
from flextron_mcore.space import ElasticSpace, SubNetwork

INFO_FILE = digests.CHECKPOINT_FILE
TABLE_FILE = "latency.json"  # latency table, in the directory of `flextron latency` and in checkpoints with routers
FORMAT_VERSION = 1
_ITERATION = re.compile(r"iter_(\d+)$")


@dataclass(frozen=True)
class CheckpointInfo:
    """Description of a checkpoint, the content of flextron.json.

    Attributes:
        model: architecture of the full model.
        space: elastic space.
        dtype: precision of the weights, fp32, bf16 or fp16.
        step: number of training steps after which the checkpoint was written.
        sorted: True if heads and neurons are in the order of decreasing importance (`flextron importance`).
        hf_config: content of config.json of the Hugging Face model that the checkpoint was imported from; None if it was not.
        path: directory of an opened checkpoint; None for a checkpoint that is not written yet, or a random initialisation.
        verifiable: False for an opened checkpoint that an earlier version wrote without digests.
    """

    model: ModelConfig
    space: ElasticSpace
    dtype: str = "fp32"
    step: int = 0
    sorted: bool = False
    hf_config: Mapping[str, Any] | None = None
    path: Path | None = field(default=None, compare=False)
    verifiable: bool = field(default=True, compare=False)

    @property
    def tokenizer(self) -> Path | None:
        """Tokenizer directory of the run that the checkpoint lies in; None without one."""
        folder = self.path.parent.parent / "tokenizer" if self.path else None
        return folder if folder and folder.is_dir() else None

    def at_step(self, step: int, **changes: Any) -> CheckpointInfo:
        """Description of the checkpoint that training writes after `step`. changes: further fields with other values."""
        return replace(self, step=step, path=None, **changes)

    def network(self, file: str | Path) -> SubNetwork:
        """Read a sub-network from a JSON file. Raises FlextronError for a bad file, and for a network outside of the space."""
        net = SubNetwork.from_file(file)
        self.space.check(self.model, net, str(file))
        return net

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, for flextron.json. `path` and `verifiable` are left out."""
        return {
            "format": FORMAT_VERSION,
            "step": self.step,
            "dtype": self.dtype,
            "sorted": self.sorted,
            "model": self.model.to_dict(),
            "space": self.space.to_dict(),
            "hf_config": dict(self.hf_config) if self.hf_config else None,
        }


def iteration_path(run: Path, step: int) -> Path:
    """Path of a run's checkpoint of a step: RUN/checkpoints/iter_0000100."""
    return run / "checkpoints" / f"iter_{step:07d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Directories of a run's checkpoints, by increasing step. Their files are not checked; `open_checkpoint` does that."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _ITERATION.match(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(_ITERATION.match(p.name)[1]))


def open_checkpoint(path: str | Path, key: str = "checkpoint") -> CheckpointInfo:
    """Open a checkpoint: `path` is its directory, or a run or its folder `checkpoints`, whose newest checkpoint is opened.

    key: key that names the path, for messages.

    Raises FlextronError naming a file that is missing or is not as it was written. Of weights only the size is compared, not the
    content (runs/verification.py does that). A damaged newest checkpoint is an error: an older one is never taken in its place.
    """
    path = Path(path)
    if not path.exists():
        raise FlextronError(f"{key}={path}: no such directory: name the out of a stage that wrote a checkpoint")
    if not (path / INFO_FILE).is_file() and not _ITERATION.match(path.name):
        found = list_checkpoints(path) or list_checkpoints(path.parent if path.name == "checkpoints" else path)
        if not found:
            raise FlextronError(
                f"{key}={path}: no checkpoint in it (no checkpoints/iter_*): name the out of a stage that wrote one"
            )
        path = found[-1]
    check_folder(path)
    file = path / INFO_FILE
    if damage := _damage(path):
        raise FlextronError(f"{damage}; {_remedy(path)}")
    digests.check_files(path.resolve().parent.parent, "tokenizer")
    values = read_json(file)
    if (version := values.get("format")) != FORMAT_VERSION:
        raise FlextronError(
            f"{file}: format {json.dumps(version)} is not {FORMAT_VERSION}: written by another version of flextron_mcore: use "
            "that version"
        )
    try:
        model = ModelConfig.from_dict(values["model"])
        return CheckpointInfo(
            model=model,
            space=ElasticSpace.from_dict(model, values["space"]),
            dtype=values["dtype"],
            step=values["step"],
            sorted=values["sorted"],
            hf_config=values["hf_config"],
            path=path.resolve(),
            verifiable=digests.is_sealed(values),
        )
    except (LookupError, TypeError, AttributeError, FlextronError) as error:
        raise FlextronError(f"{file}: not a checkpoint description ({explain(error)}): bring it back from a copy") from None


def files_of(info: CheckpointInfo) -> dict[str, digests.Entry]:
    """{name: size and digest} of the files of an opened checkpoint, from its flextron.json."""
    file = info.path / INFO_FILE
    return digests.files_of(digests.read_description(file), file)


def is_weights(name: str) -> bool:
    """True for a file of weights or optimizer state, whose content is not compared when a checkpoint is opened."""
    return name.endswith(".distcp")


def _damage(path: Path) -> str | None:
    """Message about the first file of a checkpoint that is missing or changed; None if all are as they were written.

    Of weights only the size is compared.
    """
    file = path / INFO_FILE
    if not file.is_file():
        return f"{file} is missing"
    try:
        values = read_json(file)
        values.get("files")
        entries = digests.files_of(digests.unseal(values, file), file)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"{file} is damaged: not a checkpoint description ({explain(error)})"
    except FlextronError:
        return f"{file} is damaged: it changed since it was written"
    found = (digests.damage(path / name, entry, content=not is_weights(name)) for name, entry in entries.items())
    return next(filter(None, found), None)


def _remedy(path: Path) -> str:
    """Advice about a damaged checkpoint: remove it to continue from an older complete one; if there is none, restore it."""
    path = path.resolve()
    every = list_checkpoints(path.parent.parent)
    older = every[: every.index(path)] if path in every else []
    whole = next((p for p in reversed(older) if not _damage(p)), None)
    if whole:
        return f"remove {path} to continue from {whole.name}"
    return f"no older checkpoint beside it is complete: {digests.remedy(path)}"


def write_info(directory: Path, info: CheckpointInfo) -> None:
    """Write a checkpoint's flextron.json, with sizes and digests of all other files in its directory.

    Call on the main process, after all ranks have written.
    """
    files = {name: digests.entry_of(directory / name) for name in digests.listed(directory) if name != INFO_FILE}
    text = json.dumps(digests.seal({**info.to_dict(), "files": files}), indent=1)
    (directory / INFO_FILE).write_text(text + "\n", encoding="utf-8")
