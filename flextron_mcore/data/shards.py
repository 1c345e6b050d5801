"""Token files of a domain, written in shards that a killed `prepare` leaves behind and the next one takes over."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import FlextronError
from ..runtime.progress import Progress
from .index import read_index
from .split import Documents, pieces
from .tokenizer import BATCH, groups
from .writers import PARTS, Batch, Writer, shard_file

_BATCHES = 16  # batches of a shard, about 32 million characters of text; a kill loses at most one shard of each process
_IDENTITY = "identity"  # file in the directory of shards


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
        self._shards: list[list[Path]] = [[] for _ in parts]  # of each domain
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

    def write(self, parts: Sequence[Part], writer: Writer) -> None:
        """Tokenize all domains into shards, except for the shards that are whole. writer: what tokenizes and writes them."""
        left, bar = sum(int(part.documents.sizes.sum()) for part in parts), None
        again = "continuing, " if any(self.work.glob("*_valid.idx")) else ""
        for prefix, batches in self._divided(parts):
            if _is_whole(prefix):
                size = sum(size for _, size in batches)
                left -= size
                if bar is not None:
                    bar.update(size)
                continue
            if bar is None:
                bar = Progress(total=left, desc=f"prepare: {again}tokenizing", unit="B", unit_scale=True)
                self.work.mkdir(parents=True, exist_ok=True)
                (self.work / _IDENTITY).write_text(self.identity, encoding="utf-8")
            writer.write(prefix, batches, bar.update)
        writer.finish()
        if bar is not None:
            bar.close()

    def join(self, number: int, part: Part, vocab_size: int, out: Path) -> tuple[int, int]:
        """Join a domain's shards into the token files DOMAIN_train and DOMAIN_valid; return their numbers of tokens.

        Args:
            number: number of the domain.
            part: domain.
            vocab_size: largest token id + 1, which decides the size of an id in the files.
            out: directory of the token files.
        """
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        counts = []
        for name in PARTS:
            joined = IndexedDatasetBuilder(str(out / f"{part.domain}_{name}.bin"), dtype=DType.optimal_dtype(vocab_size))
            for prefix in self._shards[number]:
                joined.add_index(str(shard_file(prefix, name, "")))
            joined.finalize(str(out / f"{part.domain}_{name}.idx"))
            counts.append(int(np.sum(joined.sequence_lengths, dtype=np.int64)))
        return counts[0], counts[1]

    def _divided(self, parts: Sequence[Part]) -> Iterator[tuple[Path, Iterator[tuple[Batch, int]]]]:
        """(path of a shard, its batches with their bytes) of all domains, in order. The batches have to be read in this order."""
        for number, part in enumerate(parts):
            for shard, entries in itertools.groupby(enumerate(_sized(part)), lambda entry: entry[0] // _BATCHES):
                prefix = self.work / f"{number}_{shard}"
                self._shards[number].append(prefix)
                yield prefix, (entry for _, entry in entries)

    def _is_mine(self) -> bool:
        file = self.work / _IDENTITY
        return file.is_file() and file.read_text(encoding="utf-8") == self.identity

    def close(self, keep: bool) -> None:
        """Remove the shards. keep: True keeps them if one is whole, for the next `prepare`."""
        if not (
            keep and any(_is_whole(file.with_name(file.name[: -len("_valid.idx")])) for file in self.work.glob("*_valid.idx"))
        ):
            shutil.rmtree(self.work, ignore_errors=True)


def _sized(part: Part) -> Iterator[tuple[Batch, int]]:
    """(batch, bytes of the documents that begin in it) of a domain."""
    last = -1
    for batch in groups(part.texts()):
        begun = sorted({i for i, _, _ in batch if i > last})
        last = batch[-1][0]
        yield [(valid, text) for _, valid, text in batch], int(part.documents.sizes[begun].sum())


def _is_whole(prefix: Path) -> bool:
    """True if both token files of a shard are there and consistent; a crash of the machine may leave truncated ones."""
    try:
        return all(read_index(shard_file(prefix, name, ""), "") for name in PARTS)
    except FlextronError:
        return False
