"""Checkpoint directories: find, describe, read and write them.

A checkpoint is Megatron-Core's torch_dist format (a torch.distributed.checkpoint) with vanilla keys and shapes, plus
`flextron.json` that says what it is. A run keeps them as `RUN/checkpoints/iter_0000100`, its tokenizer as `RUN/tokenizer`.
Writing goes to `RUN/checkpoints/.iter_0000100.tmp`, renamed when whole: a directory with the final name is a whole checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from flextron_mcore.checkpoint.sharding import dealt_axis, to_disk_order, to_sorted_order
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.runtime.compat import know_paths
from flextron_mcore.runtime.disk import check_space, forget, plain_errors
from flextron_mcore.runtime.ranks import place, wait_for_all
from flextron_mcore.space import ElasticSpace

INFO_FILE = "flextron.json"
FORMAT_VERSION = 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_ITERATION = re.compile(r"iter_(\d+)$")
know_paths()


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
    """What to do about the damaged checkpoint `path`."""
    path = path.resolve()
    every = list_checkpoints(path.parent.parent)
    older = every[: every.index(path)] if path in every else []
    whole = next((p for p in reversed(older) if not _damage(p)), None)
    if whole:
        return f"remove {path} to continue from {whole.name}"
    return "no older checkpoint beside it is whole: bring it back from a copy, or make it again"


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
        """Shape of a tensor; of the vocabulary without what pads it to equal parts for tensor-parallel ranks."""
        rows, *rest = self._tensors[key].size
        return (self.info.model.vocab_size if key in _VOCABULARY else rows, *rest)

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, units: int | None = None) -> torch.Tensor:
        """The tensor on the CPU in its stored dtype, units in sorted order. Raises FlextronError for a damaged file.

        units: where units are stored in dealt order, of each block only the first ones, at least so many. Else it is whole.
        """
        tensor = self.stored(key)
        dealt = dealt_axis(self.info.model, self.info.space, key)
        return tensor[: self.shape(key)[0]] if dealt is None else to_sorted_order(tensor, *dealt, first=units)

    def stored(self, key: str) -> torch.Tensor:
        """As `read`, but all of it and in the order in which it is stored.

        What was stored as one piece is a view of the mapped file: what nobody looks at is not read.
        """
        try:
            with plain_errors():
                tensor = self._mapped(key)
                if tensor is None:
                    stored = self._tensors[key]
                    tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
                    dcp.load({key: tensor}, storage_reader=self._reader, no_dist=True)
        except Exception as error:
            raise FlextronError(
                f"{self.info.path}: tensor {key} cannot be read: the checkpoint is damaged ({_first_line(error)})"
            ) from None
        return tensor

    def _mapped(self, key: str) -> torch.Tensor | None:
        """The tensor in its stored order as a view of its file; None if other things are in there, or parts elsewhere."""
        stored = self._tensors[key]
        if len(stored.chunks) != 1:
            return None
        place = self._reader.read_metadata().storage_data[MetadataIndex(key, stored.chunks[0].offsets)]
        file = self.info.path / place.relative_path
        if place.offset or place.length != file.stat().st_size or getattr(place, "transform_descriptors", None):
            return None
        tensor = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        if tensor.shape != stored.size or tensor.dtype != stored.properties.dtype:
            raise ValueError(f"{file.name} holds {tuple(tensor.shape)} {tensor.dtype}")
        return tensor


class _CachedReader(dcp.FileSystemReader):
    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when it is written: shape, dtype, and how.

    buckets: how many its units lie in (checkpoint/sharding.py); 1: they are in sorted order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    buckets: int = 1


def write_streaming(
    directory: Path,
    info: CheckpointInfo,
    tensors: Mapping[str, LazyTensor],
    progress: Callable[[int], None] | None = None,
    common: Mapping[str, Any] | None = None,
    elsewhere: bool = False,
) -> None:
    """Write a model's checkpoint into the empty `directory`, a tensor at a time; meanwhile the next ones are made, by a thread.

    Call on all ranks, with the same arguments: each makes and writes its share of the tensors. progress is called with the bytes
    of each tensor written, scaled to the share. common: plain values that every load returns beside the tensors. elsewhere: it is
    not for a stage that follows here, so the page cache need not keep it. The result is what Megatron-Core's own save of the
    model gives: the same keys, shapes and order, loadable at any layout.
    """

    def dealt(key: str, lazy: LazyTensor) -> LazyTensor:
        order = dealt_axis(info.model, info.space, key)
        if order is None or order[2] == lazy.buckets:
            return lazy
        return replace(lazy, load=lambda: to_disk_order(_checked(key, lazy), *order))

    write_torch_dist(directory, {key: dealt(key, lazy) for key, lazy in tensors.items()}, progress, common, elsewhere)
    if place()[0] == 0:
        write_info(directory, info)
    wait_for_all()


def write_torch_dist(
    directory: Path,
    tensors: Mapping[str, LazyTensor],
    progress: Callable[[int], None] | None = None,
    common: Mapping[str, Any] | None = None,
    elsewhere: bool = False,
) -> None:
    """`write_streaming` of tensors in the order in which they come, and without `flextron.json`."""
    rank, ranks = place()
    sizes = {key: t.dtype.itemsize * torch.Size(t.shape).numel() for key, t in tensors.items()}
    need = sum(sizes.values())
    check_space(directory, need)
    mine = share_out(sizes, ranks)[rank]
    state: dict[str, Any] = {key: torch.empty(t.shape, dtype=t.dtype, device="meta") for key, t in tensors.items() if key in mine}
    for key in tensors if rank == 0 else ():
        if key.endswith((".linear_qkv.weight", ".linear_proj.weight", ".linear_fc1.weight", ".linear_fc2.weight")):
            # Megatron-Core's linear layers carry an empty "extra state" that every load asks for.
            extra = ShardedObject(key.removesuffix("weight") + "_extra_state", None, (1,), (0,))
            payload = io.BytesIO()
            torch.save([None], payload)
            state[extra.unique_key] = payload
    share = sum(sizes[key] for key in mine)
    planner = _StreamingPlanner(tensors, progress and (lambda size: progress(size * need // share)))
    # A file a tensor: torch's writer keeps the tensors of a file until the file is finished. Nothing passes through a GPU.
    writer = dcp.FileSystemWriter(directory, single_file_per_rank=False, thread_count=1, per_thread_copy_ahead=0)
    if elsewhere:
        writer.fs = _ForgottenFiles()
    with planner.ahead, _without_crc():
        dcp.save(state, storage_writer=writer, planner=planner, no_dist=ranks == 1)
    if rank == 0:
        torch.save(dict(common or {}), directory / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(directory))
    wait_for_all()


def _checked(key: str, lazy: LazyTensor) -> torch.Tensor:
    """The tensor, of the shape and dtype that it was announced with."""
    tensor = lazy.load()
    if tuple(tensor.shape) != tuple(lazy.shape) or tensor.dtype != lazy.dtype:
        raise FlextronError(f"tensor {key}: {tuple(tensor.shape)} {tensor.dtype} instead of {tuple(lazy.shape)} {lazy.dtype}")
    return tensor


def share_out(sizes: Mapping[str, int], ranks: int) -> list[set[str]]:
    """The names of `sizes`, for each rank about the same sum: the largest first, to the rank with the least so far."""
    shares: list[set[str]] = [set() for _ in range(ranks)]
    loads = [0] * ranks
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        rank = loads.index(min(loads))
        shares[rank].add(name)
        loads[rank] += sizes[name]
    return shares


class _ForgottenFiles(FileSystem):
    """Files that leave the page cache when they are written."""

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IO[bytes]]:
        with super().create_stream(path, mode) as stream:
            yield stream
        if "w" in mode:
            forget(path)


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """torch.save without the checksums of a zip file, which torch.load does not look at: they cost as much as the writing."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _StreamingPlanner(dcp.DefaultSavePlanner):
    """Makes the next two tensors while one is written, since sizes alternate; use within `ahead`."""

    def __init__(self, tensors: Mapping[str, LazyTensor], progress: Callable[[int], None] | None) -> None:
        super().__init__(flatten_state_dict=False)
        self._lazy, self._progress = tensors, progress
        self.ahead = ThreadPoolExecutor(1)
        self._keys: list[str] = []  # yet to be made, in the order of writing
        self._made: dict[str, Future[torch.Tensor]] = {}

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        self._keys = [item.index.fqn for item in plan.items if item.type != WriteItemType.BYTE_IO]
        for _ in range(2):
            self._make_next()
        return plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return self.lookup_object(write_item.index)  # serialised already
        tensor = self._made.pop(write_item.index.fqn).result()
        self._make_next()
        if self._progress:
            self._progress(tensor.nbytes)
        return tensor

    def _make_next(self) -> None:
        if self._keys:
            key = self._keys.pop(0)
            self._made[key] = self.ahead.submit(lambda: _checked(key, self._lazy[key]).contiguous())


def write_info(directory: Path, info: CheckpointInfo) -> None:
    """Write `flextron.json`; last of all, since it records the sizes of all other files, in bytes.

    Call on the main process when every rank has finished its files.
    """
    files = {file.name: file.stat().st_size for file in sorted(directory.iterdir()) if file.is_file() and file.name != INFO_FILE}
    text = json.dumps({**info.to_dict(), "files": files}, indent=1)
    (directory / INFO_FILE).write_text(text + "\n", encoding="utf-8")


def load_model(model: torch.nn.Module, info: CheckpointInfo) -> None:
    """Load the weights into a built model (this rank's part), a layer at a time so that memory stays that of the model.

    Modulation that the checkpoint lacks, since `info` adds it, stays as it is. Call on all ranks. Raises FlextronError for a
    checkpoint that is damaged or of another architecture.
    """
    from megatron.core import dist_checkpointing

    from flextron_mcore.model import unwrap

    gpt = unwrap(model)
    groups: dict[str, dict[str, Any]] = {}
    stored = set(TensorReader(info).keys()) if info.space.modulation else set()
    for key, value in gpt.sharded_state_dict(metadata={"non_homogeneous_layers": True}).items():
        layer = re.match(r"decoder\.layers\.\d+\.", key)
        if value.key in stored or not key.endswith(".modulation"):
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
