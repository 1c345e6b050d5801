"""Reading the tensors of a checkpoint: one at a time without process groups, or all into a model."""

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
from flextron_mcore.config import FlextronError
from flextron_mcore.runtime.compat import know_paths
from flextron_mcore.runtime.disk import first_line, plain_errors
from flextron_mcore.runtime.unwrap import unwrap

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
know_paths()


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
        """Read a whole tensor in the order in which it is stored (`read` gives the sorted order).

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
                f"{self.info.path}: tensor {key} cannot be read: the checkpoint is damaged ({first_line(error)})"
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


def load_model(model: torch.nn.Module, info: CheckpointInfo) -> None:
    """Load the weights into a built model (this rank's part), a layer at a time so that memory stays that of the model.

    Modulation that the checkpoint lacks, since `info` adds it, stays as it is. Call on all ranks. Raises FlextronError for a
    checkpoint that is damaged or of another architecture.
    """
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
                f"checkpoint={info.path}: cannot be loaded, damaged or of another model ({first_line(error)})"
            ) from error
        gpt.load_state_dict({key: loaded[key] for key in wanted}, strict=False)
