"""Checkpoint directories: find, describe, read and write them.

A checkpoint is Megatron-Core's torch_dist format (a torch.distributed.checkpoint) with vanilla keys and shapes, plus
`flextron.json` that says what it is. A run keeps them as `RUN/checkpoints/iter_0000100`, its tokenizer as `RUN/tokenizer`.
Writing goes to `RUN/checkpoints/.iter_0000100.tmp`, renamed when whole: a directory with the final name is a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from flextron_mcore.checkpoint.sharding import dealt_axis, to_disk_order, to_sorted_order
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import ElasticSpace

INFO_FILE = "flextron.json"
FORMAT_VERSION = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ITERATION = re.compile(r"iter_(\d+)$")


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint is.

    sorted: whether its units are in order of importance. hf_config: the Hugging Face config it was imported from.
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
    """Whole checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if _ITERATION.match(p.name) and (p / INFO_FILE).is_file()]
    return sorted(found, key=lambda p: int(_ITERATION.match(p.name)[1]))


def open_checkpoint(path: str | Path) -> CheckpointInfo:
    """The checkpoint at `path`: a run directory (its newest), or one checkpoint. Raises FlextronError naming what is missing."""
    path = Path(path)
    if not path.exists():
        raise FlextronError(f"checkpoint={path}: no such directory")
    if not (path / INFO_FILE).is_file():
        whole = list_checkpoints(path) or list_checkpoints(path.parent if path.name == "checkpoints" else path)
        if not whole:
            raise FlextronError(f"checkpoint={path}: no whole checkpoint in it (looked for checkpoints/iter_*/{INFO_FILE})")
        path = whole[-1]
    file = path / INFO_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        version = values["format"]
        if version != FORMAT_VERSION:
            raise FlextronError(f"{file}: format {version} is not {FORMAT_VERSION}: written by another version of flextron_mcore")
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
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
        raise FlextronError(f"{file}: not a checkpoint description ({type(error).__name__}: {error})") from None


@contextlib.contextmanager
def write_aside(target: Path) -> Iterator[Path]:
    """A directory beside `target` to write into; it takes the name `target` at the end, or goes if anything fails.

    A full disk becomes a FlextronError.
    """
    aside = target.parent / f".{target.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    with disk_errors(target):
        try:
            aside.mkdir(parents=True)
        except OSError as error:
            raise FlextronError(f"{target}: cannot be written: {error.strerror}") from None
        try:
            yield aside
            publish(aside, target)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def publish(aside: Path, target: Path) -> None:
    """Give a finished directory its name, replacing what had it."""
    if target.exists():
        old = target.parent / f".{target.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        aside.rename(target)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """torch.distributed.checkpoint wraps what goes wrong on a rank in a BaseException of its own: raise what went wrong."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


@contextlib.contextmanager
def disk_errors(target: Path, state: str = "nothing was changed") -> Iterator[None]:
    """Turn "no space left", "read-only" and "permission denied", however wrapped, into a FlextronError naming `target`.

    state: what the user has now, for the message.
    """
    try:
        with plain_errors():
            yield
    except FlextronError:
        raise
    except Exception as error:
        reason = _disk_error(error)
        if reason is None:
            raise
        raise FlextronError(f"{target}: cannot be written: {reason}; {state}, free space or choose another out=") from None


def _disk_error(error: BaseException | None) -> str | None:
    """The operating system's message if `error` or a cause of it is about writing to disk."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
    while error is not None:
        if isinstance(error, OSError) and error.errno in codes:
            return error.strerror
        text = str(error)
        if "No space left on device" in text or "file write failed" in text or "unexpected pos" in text:
            return "No space left on device"
        error = error.__cause__ or error.__context__
    return None


class TensorReader:
    """Whole tensors of a checkpoint, one at a time, in sorted order, without process groups."""

    def __init__(self, info: CheckpointInfo) -> None:
        self.info = info
        try:
            metadata = dcp.FileSystemReader(info.path).read_metadata()
        except Exception as error:
            raise FlextronError(f"{info.path}: .metadata is missing or damaged ({type(error).__name__})") from None
        self._reader = _CachedReader(info.path, metadata)
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}

    def keys(self) -> list[str]:
        """Names of the model's tensors (not of optimizer state)."""
        return [key for key in self._tensors if not key.startswith("optimizer.")]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._tensors[key].properties.dtype

    def read(self, key: str) -> torch.Tensor:
        """The tensor on the CPU in its stored dtype, units in sorted order. Raises FlextronError for a damaged file."""
        stored = self._tensors[key]
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        try:
            with plain_errors():
                dcp.load({key: tensor}, storage_reader=self._reader, no_dist=True)
        except Exception as error:
            raise FlextronError(
                f"{self.info.path}: tensor {key} cannot be read: the checkpoint is damaged ({_first_line(error)})"
            ) from None
        dealt = dealt_axis(self.info.model, self.info.space, key)
        return tensor if dealt is None else to_sorted_order(tensor, *dealt)


class _CachedReader(dcp.FileSystemReader):
    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written: shape, dtype, and how (units in sorted order)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]


def write_streaming(
    directory: Path, info: CheckpointInfo, tensors: Mapping[str, LazyTensor], progress: Callable[[int], None] | None = None
) -> None:
    """Write a model's checkpoint into the empty `directory`, holding one tensor in memory at a time.

    progress is called with the bytes of each tensor written. The result is what Megatron-Core's own save of the model gives:
    the same keys, shapes and order, loadable at any layout.
    """
    need = sum(t.dtype.itemsize * torch.Size(t.shape).numel() for t in tensors.values())
    check_space(directory, need)
    state: dict[str, Any] = {k: torch.empty(t.shape, dtype=t.dtype, device="meta") for k, t in tensors.items()}
    for key in tensors:
        if key.endswith((".linear_qkv.weight", ".linear_proj.weight", ".linear_fc1.weight", ".linear_fc2.weight")):
            # Megatron-Core's linear layers carry an empty "extra state" that every load asks for.
            extra = ShardedObject(key.removesuffix("weight") + "_extra_state", None, (1,), (0,))
            payload = io.BytesIO()
            torch.save([None], payload)
            state[extra.unique_key] = payload
    planner = _StreamingPlanner(info, tensors, progress)
    # A file a tensor: torch's writer keeps the tensors of a file until the file is finished.
    writer = dcp.FileSystemWriter(directory, single_file_per_rank=False, thread_count=1)
    dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    torch.save({}, directory / "common.pt")
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    write_info(directory, info)


class _StreamingPlanner(dcp.DefaultSavePlanner):
    """Makes each tensor when its turn comes."""

    def __init__(self, info: CheckpointInfo, tensors: Mapping[str, LazyTensor], progress: Callable[[int], None] | None) -> None:
        super().__init__(flatten_state_dict=False)
        self._info, self._lazy, self._progress = info, tensors, progress

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return self.lookup_object(write_item.index)  # serialised already
        key = write_item.index.fqn
        lazy = self._lazy[key]
        tensor = lazy.load()
        if tuple(tensor.shape) != tuple(lazy.shape) or tensor.dtype != lazy.dtype:
            raise FlextronError(f"tensor {key}: {tuple(tensor.shape)} {tensor.dtype} instead of {tuple(lazy.shape)} {lazy.dtype}")
        dealt = dealt_axis(self._info.model, self._info.space, key)
        if dealt is not None:
            tensor = to_disk_order(tensor, *dealt)
        if self._progress:
            self._progress(tensor.nbytes)
        return tensor.contiguous()


def write_info(directory: Path, info: CheckpointInfo) -> None:
    """Write `flextron.json`; last of all, since it marks a directory as a checkpoint."""
    (directory / INFO_FILE).write_text(json.dumps(info.to_dict(), indent=1) + "\n", encoding="utf-8")


def check_space(directory: Path, need: int) -> None:
    """Raise FlextronError when the disk of `directory` has less than `need` bytes free."""
    free = shutil.disk_usage(directory).free
    if free < need:
        raise FlextronError(
            f"{directory.parent}: cannot be written: {need / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free; "
            "free space or choose another out="
        )


def load_model(model: torch.nn.Module, info: CheckpointInfo) -> None:
    """Load the weights into a built model (this rank's part), a layer at a time so that memory stays that of the model.

    Call on all ranks. Raises FlextronError for a checkpoint that is damaged or of another architecture.
    """
    from megatron.core import dist_checkpointing

    from flextron_mcore.model import unwrap

    gpt = unwrap(model)
    groups: dict[str, dict[str, Any]] = {}
    for key, value in gpt.sharded_state_dict(metadata={"non_homogeneous_layers": True}).items():
        layer = re.match(r"decoder\.layers\.\d+\.", key)
        groups.setdefault(layer[0] if layer else key, {})[key] = value
    # Every load is collective: ranks that hold other layers (pipeline stages) take part with nothing to load.
    names: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(names, list(groups))
    for name in dict.fromkeys(name for rank in names for name in rank):
        group = groups.get(name, {})
        wanted = list(group)
        try:
            with plain_errors():
                loaded = dist_checkpointing.load(group, str(info.path), validate_access_integrity=False)
        except Exception as error:
            raise FlextronError(
                f"checkpoint={info.path}: cannot be loaded, damaged or of another model ({_first_line(error)})"
            ) from error
        gpt.load_state_dict({key: loaded[key] for key in wanted}, strict=False)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
