"""Token files of a domain, written in shards that a killed `prepare` leaves behind and the next one takes over."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..config import FlextronError
from ..runtime.progress import Progress
from .index import read_index, with_suffix
from .split import Documents, pieces
from .tokenizer import BATCH, Tokenizer, groups

_BATCHES = 32  # batches of a shard, about 64 million characters of text; a kill loses at most one shard
_IDENTITY = "identity"  # file in the directory of shards
PARTS = ("train", "valid")


@dataclass
class Part:
    """One domain and its split into training and validation text.

    Attributes:
        domain: name of the domain.
        corpus: iterable over the texts of the domain, the same in each iteration.
        documents: hash and size of each document of the domain.
        share: [documents], fraction of each document, counted from its end, that is validation text.
    """

    domain: str
    corpus: object
    documents: Documents
    share: np.ndarray

    def texts(self) -> Iterator[tuple[int, bool, str]]:
        """(index of the document, True for validation text, text) of all documents; a document that is cut yields two."""
        for i, (text, share) in enumerate(zip(self.corpus, self.share, strict=True)):
            for valid, piece in pieces(text, share):
                yield i, valid, piece


class Shards:
    """Directory of shards, which belong to one input, tokenizer and split. Shards of others are removed.

    Args:
        work: directory; it is made when the first shard is written.
        parts: domains with their texts.
        tokenizer: directory of the tokenizer, as saved.

    Raises FlextronError if `work` is a directory with other files.
    """

    def __init__(self, work: Path, parts: Sequence[Part], tokenizer: Path) -> None:
        self.work = work
        digest = hashlib.sha256(f"{_BATCHES} {BATCH} {[part.domain for part in parts]}".encode())
        for part in parts:  # draws are hashes of the seed and the texts
            for values in (part.documents.draws, part.documents.sizes, part.share):
                digest.update(values.tobytes())
        for file in sorted(path for path in tokenizer.rglob("*") if path.is_file()):
            digest.update(file.read_bytes())
        self.identity = digest.hexdigest()
        if work.is_dir() and any(work.iterdir()) and not (work / _IDENTITY).is_file():
            raise FlextronError(
                f"{work}: is not of an earlier `flextron prepare`, which keeps its unfinished work there: rename it"
            )
        if work.exists() and not self._is_mine():
            shutil.rmtree(work)

    def write(self, number: int, part: Part, tokens: Tokenizer, out: Path) -> tuple[int, int]:
        """Write the token files DOMAIN_train and DOMAIN_valid in `out`; return their numbers of tokens.

        Args:
            number: number of the domain.
            part: domain with its texts.
            tokens: tokenizer.
            out: directory of the token files.
        """
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        dtype = DType.optimal_dtype(tokens.vocab_size)
        done: list[Path] = []
        left, bar, last = int(part.documents.sizes.sum()), None, -1
        for shard, batches in itertools.groupby(enumerate(groups(part.texts())), lambda entry: entry[0] // _BATCHES):
            prefix = self.work / f"{number}_{shard}"
            whole = _is_whole(prefix)
            builders = {} if whole else self._builders(prefix, dtype)
            for _, batch in batches:
                read = sorted({i for i, _, _ in batch if i > last})
                last, size = batch[-1][0], int(part.documents.sizes[read].sum())
                if whole:
                    left -= size
                    continue
                if bar is None:
                    again = "continuing, " if done else ""
                    bar = Progress(total=left, desc=f"prepare: {again}tokenizing {part.domain}", unit="B", unit_scale=True)
                for (_, valid, _), ids in zip(batch, tokens.encode_batch([text for _, _, text in batch]), strict=True):
                    builders[PARTS[valid]].add_item(torch.from_numpy(ids))
                    builders[PARTS[valid]].end_document()
                bar.update(size)
            for name, builder in builders.items():
                builder.finalize(str(_named(prefix, name, ".tmp")))
            for name in builders:  # the last of these names marks a whole shard
                _named(prefix, name, ".tmp").replace(_named(prefix, name, ".idx"))
            done.append(prefix)
        if bar is not None:
            bar.close()
        counts = []
        for name in PARTS:
            merged = IndexedDatasetBuilder(str(out / f"{part.domain}_{name}.bin"), dtype=dtype)
            for prefix in done:
                merged.add_index(str(_named(prefix, name, "")))
            merged.finalize(str(out / f"{part.domain}_{name}.idx"))
            counts.append(int(np.sum(merged.sequence_lengths, dtype=np.int64)))
        return counts[0], counts[1]

    def _builders(self, prefix: Path, dtype: type) -> dict:
        """{part: builder of its token file} of a shard that is not there or not whole."""
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self.work.mkdir(parents=True, exist_ok=True)
        (self.work / _IDENTITY).write_text(self.identity, encoding="utf-8")
        for name in PARTS:
            _named(prefix, name, ".idx").unlink(missing_ok=True)
        return {name: IndexedDatasetBuilder(str(_named(prefix, name, ".bin")), dtype=dtype) for name in PARTS}

    def _is_mine(self) -> bool:
        file = self.work / _IDENTITY
        return file.is_file() and file.read_text(encoding="utf-8") == self.identity

    def close(self, keep: bool) -> None:
        """Remove the shards. keep: True keeps them if one is whole, for the next `prepare`."""
        if not (
            keep and any(_is_whole(file.with_name(file.name[: -len("_valid.idx")])) for file in self.work.glob("*_valid.idx"))
        ):
            shutil.rmtree(self.work, ignore_errors=True)


def _named(prefix: Path, part: str, suffix: str) -> Path:
    """Path of a file of a shard."""
    return with_suffix(prefix, f"_{part}{suffix}")


def _is_whole(prefix: Path) -> bool:
    """True if both token files of a shard are there and consistent; a crash of the machine may leave truncated ones."""
    try:
        return all(read_index(_named(prefix, name, ""), "") for name in PARTS)
    except FlextronError:
        return False
