"""Checkpoint directories: describe, find and open them.

A checkpoint is Megatron-Core's torch_dist format (a torch.distributed.checkpoint) with vanilla keys and shapes, plus
`flextron.json` that says what it is. A run keeps them as `RUN/checkpoints/iter_0000100`, its tokenizer as `RUN/tokenizer`.
Writing goes to `RUN/checkpoints/.iter_0000100.tmp`, renamed when whole: a directory with the final name is a whole checkpoint.
Tensors are read by checkpoint/reader.py and written by checkpoint/writer.py. No torch import.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import ElasticSpace, SubNetwork

INFO_FILE = "flextron.json"
TABLE_FILE = "latency.json"  # the latency table, in the directory of `flextron latency` and beside routers
FORMAT_VERSION = 1
_ITERATION = re.compile(r"iter_(\d+)$")


@dataclass(frozen=True)
class CheckpointInfo:
    """Description of a checkpoint.

    sorted: True if its units are in order of importance. hf_config: the Hugging Face config that it was imported from.
    """

    model: ModelConfig
    space: ElasticSpace
    dtype: str = "fp32"
    step: int = 0
    sorted: bool = False
    hf_config: Mapping[str, Any] | None = None
    path: Path | None = field(default=None, compare=False)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer directory beside the checkpoint, if there is one."""
        folder = self.path.parent.parent / "tokenizer" if self.path else None
        return folder if folder and folder.is_dir() else None

    def at_step(self, step: int, **changes: Any) -> CheckpointInfo:
        """Description of a checkpoint that training writes after `step`."""
        return replace(self, step=step, path=None, **changes)

    def network(self, file: str | Path) -> SubNetwork:
        """The sub-network that a JSON file describes. Raises FlextronError where the checkpoint has no such network."""
        net = SubNetwork.from_file(file)
        self.space.check(self.model, net, str(file))
        return net

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for `flextron.json`."""
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
    """RUN/checkpoints/iter_0000100."""
    return run / "checkpoints" / f"iter_{step:07d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first: written whole, though what happened to them since only `open_checkpoint` sees."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _ITERATION.match(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(_ITERATION.match(p.name)[1]))


def open_checkpoint(path: str | Path) -> CheckpointInfo:
    """The checkpoint at `path`: a run directory (its newest), or one checkpoint.

    Raises FlextronError naming the file that is missing, truncated or damaged (a changed bit inside a file is not seen), and
    never takes an older checkpoint for it.
    """
    path = Path(path)
    if not path.exists():
        raise FlextronError(f"checkpoint={path}: no such directory")
    if not (path / INFO_FILE).is_file() and not _ITERATION.match(path.name):
        found = list_checkpoints(path) or list_checkpoints(path.parent if path.name == "checkpoints" else path)
        if not found:
            raise FlextronError(f"checkpoint={path}: no checkpoint in it (looked for checkpoints/iter_*)")
        path = found[-1]
    file = path / INFO_FILE
    if damage := _damage(path):
        raise FlextronError(f"{damage}; {_remedy(path)}")
    values = json.loads(file.read_text(encoding="utf-8"))
    if (version := values.get("format")) != FORMAT_VERSION:
        raise FlextronError(f"{file}: format {version} is not {FORMAT_VERSION}: written by another version of flextron_mcore")
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
        )
    except (LookupError, TypeError, AttributeError, FlextronError) as error:
        raise FlextronError(f"{file}: not a checkpoint description ({type(error).__name__}: {error})") from None


def _damage(path: Path) -> str | None:
    """Which file of the checkpoint `path` is not as it was written, and how; None for a whole checkpoint."""
    file = path / INFO_FILE
    if not file.is_file():
        return f"{file} is missing"
    try:
        sizes = json.loads(file.read_text(encoding="utf-8")).get("files", {})  # early checkpoints have none
    except (OSError, ValueError, AttributeError) as error:
        return f"{file} is damaged: not a checkpoint description ({type(error).__name__})"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if (found := file.stat().st_size) != size:
            return f"{file} is {'truncated' if found < size else 'damaged'}: {found} bytes, not {size}"
    return None


def _remedy(path: Path) -> str:
    """Advice on the damaged checkpoint `path`, for an error message."""
    path = path.resolve()
    every = list_checkpoints(path.parent.parent)
    older = every[: every.index(path)] if path in every else []
    whole = next((p for p in reversed(older) if not _damage(p)), None)
    if whole:
        return f"remove {path} to continue from {whole.name}"
    return "no older checkpoint beside it is whole: bring it back from a copy, or make it again"


def write_info(directory: Path, info: CheckpointInfo) -> None:
    """Write `flextron.json`; last of all, since it records the sizes of all other files, in bytes.

    Call on the main process when every rank has finished its files.
    """
    files = {file.name: file.stat().st_size for file in sorted(directory.iterdir()) if file.is_file() and file.name != INFO_FILE}
    text = json.dumps({**info.to_dict(), "files": files}, indent=1)
    (directory / INFO_FILE).write_text(text + "\n", encoding="utf-8")
