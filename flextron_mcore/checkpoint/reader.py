"""Reading a checkpoint: one tensor at a time without process groups, or all weights into a model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from flextron_mcore.checkpoint.sharding import dealt_axis, to_sorted_order
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.checkpoint.unpickling import check_checkpoint, only_data, read_metadata, reason, without_extra_state
from flextron_mcore.config import FlextronError
from flextron_mcore.runtime.compat import know_paths
from flextron_mcore.runtime.disk import plain_errors
from flextron_mcore.runtime.unwrap import unwrap

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
know_paths()  # before the first .metadata is read


class TensorReader:
    """Reader of a checkpoint's tensors, whole and one at a time, without process groups.

    On disk, heads and neurons are dealt into buckets for tensor parallelism (checkpoint/sharding.py); `read` restores their
    order. Raises FlextronError if the checkpoint's .metadata is missing or damaged.

    info: description of an opened checkpoint.
    """

    def __init__(self, info: CheckpointInfo) -> None:
        self.info = info
        metadata = read_metadata(info.path)
        self._reader = _CachedReader(info.path, metadata)
        self._tensors = {k: v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}

    def keys(self) -> list[str]:
        """Names of the model's tensors, without tensors of the optimizer."""
        return [key for key in self._tensors if not key.startswith("optimizer.")]

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without rows that pad the vocabulary for tensor-parallel ranks."""
        rows, *rest = self._tensors[key].size
        return (self.info.model.vocab_size if key in _VOCABULARY else rows, *rest)

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._tensors[key].properties.dtype

    def read(self, key: str, units: int | None = None) -> torch.Tensor:
        """Read a tensor to the CPU in its stored dtype, with heads and neurons in order instead of dealt into buckets.

        The order is by decreasing importance if the checkpoint is sorted (`flextron importance`). Raises FlextronError for a
        damaged file.

        Args:
            key: name of the tensor.
            units: number of KV groups (attention) or neurons (MLP) to read, the first ones, rounded up to a multiple of the
                granularity; in fc1 of a gated MLP as many of the gate and of the up projection. None: all. A tensor that is not
                dealt is always read whole.
        """
        tensor = self.stored(key)
        dealt = dealt_axis(self.info.model, self.info.space, key)
        return tensor[: self.shape(key)[0]] if dealt is None else to_sorted_order(tensor, *dealt, first=units)

    def stored(self, key: str) -> torch.Tensor:
        """Read a whole tensor as it lies on disk: heads and neurons dealt into buckets, the vocabulary with its padding.

        A tensor that is the only content of one file is a view of the memory-mapped file, of which only parts that are used are
        read. Raises FlextronError for a damaged file.
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
                f"{self.info.path}: tensor {key} cannot be read: the checkpoint is damaged ({reason(error)}): bring it "
                "back from a copy, or make it again"
            ) from None
        return tensor

    def _mapped(self, key: str) -> torch.Tensor | None:
        """Tensor as it lies on disk, as a view of its memory-mapped file; None if it is not the only content of one file."""
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
    """Reader of torch.distributed.checkpoint that takes .metadata as read and checked before, instead of unpickling it."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def load_model(model: torch.nn.Module, info: CheckpointInfo) -> None:
    """Load this rank's weights of a checkpoint into a built model, a layer at a time to bound memory. Call on all ranks.

    If the space of `info` has modulation and the checkpoint's tensors do not, the parameters of modulation keep their initial
    values. Raises FlextronError for a checkpoint that is damaged or of another architecture.

    Args:
        model: this rank's model chunk, wrapped or not.
        info: description of an opened checkpoint.
    """
    gpt = unwrap(model)
    groups: dict[str, dict[str, Any]] = {}
    stored = set(TensorReader(info).keys()) if info.space.modulation else set()
    for key, value in gpt.sharded_state_dict(metadata={"non_homogeneous_layers": True}).items():
        layer = re.match(r"decoder\.layers\.\d+\.", key)
        if value.key in stored or not key.endswith(".modulation"):
            groups.setdefault(layer[0] if layer else key, {})[key] = value
    # Loading is collective: ranks of other pipeline stages take part with nothing to load.
    check_checkpoint(info.path)
    names: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(names, list(groups))
    for name in dict.fromkeys(name for rank in names for name in rank):
        group = groups.get(name, {})
        wanted = list(group)
        try:
            with plain_errors(), only_data():
                loaded = dist_checkpointing.load(group, str(info.path), validate_access_integrity=False)
        except Exception as error:
            raise FlextronError(
                f"checkpoint={info.path}: cannot be loaded, damaged or of another model ({reason(error)}): bring it back "
                "from a copy, or make it again"
            ) from error
        gpt.load_state_dict(without_extra_state({key: loaded[key] for key in wanted}), strict=False)
