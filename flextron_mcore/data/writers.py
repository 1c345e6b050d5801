"""Tokenization of whole shards and their token files, in this process or in several."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Protocol

import torch

from ..config import FlextronError
from ..runtime.signals import end_with_parent
from .index import with_suffix
from .tokenizer import Tokenizer, open_tokenizer

PARTS = ("train", "valid")
Batch = list[tuple[bool, str]]  # (True for validation text, text) of documents that are tokenized together

_tokens: Tokenizer | None = None  # tokenizer of this process, if it is one of `processes`


class Writer(Protocol):
    """Way to write shards. Both ways write the same files."""

    def write(self, prefix: Path, batches: Iterable[tuple[Batch, int]], advance: Callable[[int], object]) -> None:
        """Tokenize a shard and write its files, perhaps after the call returns.

        Args:
            prefix: path of the shard's files without `_train` or `_valid` and a suffix.
            batches: (batch, bytes of its text) of the shard, in order.
            advance: function that is called with numbers of bytes whose tokens are written.
        """

    def finish(self) -> None:
        """Wait until all shards are whole."""


class InProcess:
    """Writer in this process, with a thread of the tokenizer on every core.

    Args:
        tokens: tokenizer.
    """

    def __init__(self, tokens: Tokenizer) -> None:
        self._tokens = tokens

    def write(self, prefix: Path, batches: Iterable[tuple[Batch, int]], advance: Callable[[int], object]) -> None:
        """Tokenize a shard and write its files at once.

        Args:
            prefix: path of the shard's files, as in `Writer.write`.
            batches: (batch, bytes of its text) of the shard.
            advance: function that is called with numbers of bytes.
        """
        _write(prefix, batches, self._tokens, advance)

    def finish(self) -> None:
        """Return at once: every shard is whole when `write` returns."""


class Processes:
    """Writer in several processes, each of which tokenizes one shard at a time. Made by `processes`.

    Args:
        pool: the processes.
        workers: their number. One shard more waits in memory.
    """

    def __init__(self, pool: ProcessPoolExecutor, workers: int) -> None:
        self._pool, self._workers = pool, workers
        self._started: list[Future[int]] = []
        self._running: dict[Future[None], tuple[int, Callable[[int], object]]] = {}

    def write(self, prefix: Path, batches: Iterable[tuple[Batch, int]], advance: Callable[[int], object]) -> None:
        """Give a shard to a process, after waiting for one if all are busy.

        Args:
            prefix: path of the shard's files, as in `Writer.write`.
            batches: (batch, bytes of its text) of the shard.
            advance: function that is called with numbers of bytes.
        """
        if not self._started:
            # All processes at once: one that died while a later one starts would break the pool with other errors.
            self._started = [self._pool.submit(os.getpid) for _ in range(self._workers)]
        while len(self._running) > self._workers:
            self._collect()
        given = list(batches)
        future = self._pool.submit(_write_here, prefix, [batch for batch, _ in given])
        self._running[future] = sum(size for _, size in given), advance

    def finish(self) -> None:
        """Wait until all shards are whole, and raise the error of a process that failed."""
        while self._running:
            self._collect()

    def _collect(self) -> None:
        """Wait for a shard, and raise the error of its process."""
        for future in wait(self._running, return_when=FIRST_COMPLETED).done:
            size, advance = self._running.pop(future)
            future.result()
            advance(size)


@contextlib.contextmanager
def processes(
    workers: int, tokens: Tokenizer, directory: Path, add_bos: bool | None, parse_special_tokens: bool | None
) -> Iterator[Writer]:
    """Context with `workers` processes that write shards. They end with the block, or with this process however it ends.

    Args:
        workers: number of processes; they share the cores evenly.
        tokens: tokenizer of this process.
        directory: where `tokens` is saved.
        add_bos: as in `open_tokenizer`.
        parse_special_tokens: as in `open_tokenizer`.

    Raises FlextronError if the saved tokenizer is not the same one, and, in the block, if a process is killed.
    """
    if open_tokenizer(directory, add_bos, parse_special_tokens).state() != tokens.state():
        raise FlextronError(f"{directory}: opens as another tokenizer than the one it was saved from: prepare with workers=1")
    others = set(multiprocessing.active_children())
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    pool = ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        _begin,
        (directory, add_bos, parse_special_tokens, threads),
    )
    try:
        yield Processes(pool, workers)
    except BrokenProcessPool:
        raise FlextronError(
            f"one of {workers} processes that tokenize was killed, perhaps for lack of memory: run the same command again, "
            "with fewer workers"
        ) from None
    finally:
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
        pool.shutdown(cancel_futures=True)


def _begin(directory: Path, add_bos: bool | None, parse_special_tokens: bool | None, threads: int) -> None:
    """Prepare a new process: open the tokenizer, leave signals to the main process, and end when that process ends."""
    global _tokens
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes; the main one ends the others
    end_with_parent()
    os.environ.setdefault("RAYON_NUM_THREADS", str(threads))  # read by the tokenizer's library when it first encodes
    _tokens = open_tokenizer(directory, add_bos, parse_special_tokens)


def _write_here(prefix: Path, batches: list[Batch]) -> None:
    assert _tokens is not None
    _write(prefix, ((batch, 0) for batch in batches), _tokens, lambda size: None)


def _write(prefix: Path, batches: Iterable[tuple[Batch, int]], tokens: Tokenizer, advance: Callable[[int], object]) -> None:
    """Tokenize a shard into PREFIX_{train,valid}.{bin,idx}. The name PREFIX_valid.idx appears last and marks a whole shard."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    for name in PARTS:
        shard_file(prefix, name, ".idx").unlink(missing_ok=True)
    dtype = DType.optimal_dtype(tokens.vocab_size)
    builders = {name: IndexedDatasetBuilder(str(shard_file(prefix, name, ".bin")), dtype=dtype) for name in PARTS}
    for batch, size in batches:
        for (valid, _), ids in zip(batch, tokens.encode_batch([text for _, text in batch]), strict=True):
            builders[PARTS[valid]].add_item(torch.from_numpy(ids))
            builders[PARTS[valid]].end_document()
        advance(size)
    for name, builder in builders.items():
        builder.finalize(str(shard_file(prefix, name, ".tmp")))
    for name in PARTS:
        shard_file(prefix, name, ".tmp").replace(shard_file(prefix, name, ".idx"))


def shard_file(prefix: Path, part: str, suffix: str) -> Path:
    """Path of a file of a shard, such as PREFIX_train.bin.

    Args:
        prefix: path of the shard.
        part: `train` or `valid`.
        suffix: suffix of the file with its dot.
    """
    return with_suffix(prefix, f"_{part}{suffix}")
