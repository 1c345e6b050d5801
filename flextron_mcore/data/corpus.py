"""Stream of documents from text files and directories of a corpus."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config import FlextronError
from ..files import expanded
from . import builtin
from .formats import COMPRESSED_SUFFIXES, LINES_SUFFIXES, PARQUET_SUFFIX, Broken, inner_suffix, open_documents

TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".adoc", ".org"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".m", ".cs", ".java", ".kt"),
    *(".scala", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".vue", ".go", ".rs", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".swift"),
    *(".hs", ".ml", ".clj", ".ex", ".erl", ".f90", ".sql", ".sh", ".bash", ".zsh", ".ps1", ".cmake", ".mk"),
    *(".html", ".htm", ".css", ".scss", ".xml", ".json", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".csv", ".tsv"),
)


_NAMED = 5  # maximum number of reasons for leaving files out that a summary names


@dataclass
class Corpus:
    """Iterable over the documents (str) of one domain.

    Each iteration reads the files again, in the same order, and holds one document in memory. Texts of white space only are
    left out and counted. Input that cannot be read raises FlextronError; with skip_bad=True it is skipped and recorded instead.

    Attributes:
        domain: name of the domain.
        sources: paths of files, or `builtin:NAME`.
        left_out: {reason, such as a file suffix: number of directory entries that are not read}.
        text_key: field of a JSON object, or column of a Parquet file, that holds the text.
        skip_bad: skip files and entries that cannot be read.
        skipped: {file, or file and line: reason} of the last iteration.
        read: {format: number of files} of the last iteration.
        empty: number of empty texts in the last iteration.
    """

    domain: str
    sources: list[Path | str]
    left_out: Counter[str] = field(default_factory=Counter)
    text_key: str = "text"
    skip_bad: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    read: Counter[str] = field(default_factory=Counter)
    empty: int = 0

    def __iter__(self) -> Iterator[str]:
        self.skipped, self.read, self.empty = {}, Counter(), 0
        for source in self.sources:
            if isinstance(source, str):
                self.read["built-in"] += 1
                yield from builtin.documents(source)
            else:
                yield from self._documents(source)

    def summary(self) -> str:
        """Text for users about the last iteration: numbers of files read, left out by reason, empty texts, unreadable entries."""
        read = ", ".join(f"{count} {name}" for name, count in self.read.most_common())
        parts = [f"read {sum(self.read.values())} file(s) ({read or 'none'})"]
        if self.left_out:
            common = self.left_out.most_common()
            named = [f"{count} {name}" for name, count in common[:_NAMED]]
            others = sum(count for _, count in common[_NAMED:])
            parts.append(f"left out {', '.join(named)}" + (f" and {others} others" if others else ""))
        if self.empty:
            parts.append(f"{self.empty} empty text(s) skipped")
        if self.skipped:
            parts.append(f"{len(self.skipped)} unreadable skipped")
        return "; ".join(parts)

    def _documents(self, path: Path) -> Iterator[str]:
        """Documents of one file; counts it in `read`, and its empty texts in `empty`."""
        texts = 0
        try:
            name, entries = open_documents(path, self.text_key)
            self.read[name] += 1
            for entry in entries:
                texts += 1
                if entry.fault:
                    self._bad(f"{path}, {entry.place}" if entry.place else str(path), entry.fault)
                elif entry.text.strip():
                    yield entry.text
                else:
                    self.empty += 1
        except Broken as error:
            self._bad(str(path), str(error))
        else:
            self.empty += not texts  # a file of JSON lines that has no line counts as one empty text

    def _bad(self, place: str, reason: str) -> None:
        """Record an unreadable file or entry in `skipped`; without skip_bad raise FlextronError instead."""
        if not self.skip_bad:
            raise FlextronError(f"{place}: {reason} (skip_bad=true skips such input)")
        self.skipped[place] = reason


def open_corpus(domain: str, paths: Sequence[str | Path], text_key: str = "text", skip_bad: bool = False) -> Corpus:
    """Corpus of one domain. Lists directories, and reads no file yet.

    Args:
        domain: name of the domain.
        paths: files, directories, and `builtin:NAME` (builtin.py), whose NAME is checked when the corpus is iterated. Directories
            are walked in sorted order, and symbolic links are followed, each directory once. Hidden names and files of unknown
            suffix in directories are left out. A file given by its own path is read whatever its suffix.
        text_key: field of a JSON object, or column of a Parquet file, that holds the text.
        skip_bad: skip files and entries that cannot be read.

    Raises:
        FlextronError: a path does not exist, is a pipe or device, or is a directory without a file to read, with and without
            skip_bad.
    """
    corpus = Corpus(domain, [], text_key=text_key, skip_bad=skip_bad)
    for entry in paths:
        if builtin.is_builtin(entry):
            corpus.sources.append(str(entry))
            continue
        path = expanded(entry)
        if path.is_dir():
            known = _walk(path, corpus.left_out)
            if not known:
                raise FlextronError(
                    f"{path}: no file to read in this directory ({corpus.summary()}): give the path of each file, which is then "
                    "read whatever its suffix"
                )
            corpus.sources += known
        elif path.is_file():
            corpus.sources.append(path)
        elif path.exists():
            raise FlextronError(f"{path}: is a pipe or device, but the text is read several times: write it to a file first")
        else:
            raise FlextronError(f"{path}: no such file or directory (input of domain '{domain}')")
    return corpus


def _walk(root: Path, left_out: Counter[str]) -> list[Path]:
    """Files to read below a directory, sorted. Counts all other entries in `left_out` by reason."""
    known: list[Path] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a second link to a directory, or a link to a parent directory
            left_out["linked again"] += 1
            folders.clear()
            continue
        seen.add(real)
        left_out["hidden"] += sum(name.startswith(".") for name in [*folders, *names])
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(folder, name)
            if path.exists() and not path.is_file():
                left_out["pipe or device"] += 1
            elif _is_known(name):
                known.append(path)
            else:
                left_out[path.suffix.lower() or "without suffix"] += 1
    left_out += Counter()  # drops zeros
    return known


def _is_known(name: str) -> bool:
    """True if a file of this name is read in a directory: known text or JSON lines suffix, Parquet, or .gz without another."""
    suffix = inner_suffix(name)
    compressed = name.lower().endswith(COMPRESSED_SUFFIXES)
    return (
        suffix in TEXT_SUFFIXES + LINES_SUFFIXES or (compressed and not suffix) or (not compressed and suffix == PARQUET_SUFFIX)
    )
