"""Documents out of files and directories, as a stream. Bad input is one line that names the file."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config import FlextronError, nearest
from . import builtin

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
TEXT_SUFFIXES = (
    *(".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".adoc", ".org"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".cxx", ".hh", ".hpp", ".cu", ".cuh", ".m", ".cs", ".java", ".kt"),
    *(".scala", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".vue", ".go", ".rs", ".rb", ".php", ".pl", ".lua", ".r", ".jl", ".swift"),
    *(".hs", ".ml", ".clj", ".ex", ".erl", ".f90", ".sql", ".sh", ".bash", ".zsh", ".ps1", ".cmake", ".mk"),
    *(".html", ".htm", ".css", ".scss", ".xml", ".json", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".csv", ".tsv"),
)


@dataclass
class Corpus:
    """The documents of one domain. Iterating reads the files anew, in the same order every time.

    Memory holds one document at a time. With `skip_bad`, a file or a jsonl line that cannot be read is left out and noted in
    `skipped` (place -> reason); without, it raises FlextronError.
    """

    domain: str
    sources: list[Path | str]  # files, or `builtin:NAME`
    ignored: int = 0  # files in directories left out because of their suffix or because they are empty
    text_key: str = "text"
    skip_bad: bool = False
    skipped: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        for source in self.sources:
            if isinstance(source, str):
                yield from builtin.documents(source)
            elif source.name.lower().endswith(JSONL_SUFFIXES):
                yield from self._read_jsonl(source)
            else:
                yield from self._read_text(source)

    def _bad(self, place: str, reason: str) -> None:
        if not self.skip_bad:
            raise FlextronError(f"{place}: {reason} (skip_bad=true leaves such input out)")
        self.skipped[place] = reason

    def _read_text(self, path: Path) -> Iterator[str]:
        try:
            text = path.read_bytes().decode("utf-8-sig")
        except OSError as error:
            return self._bad(str(path), f"cannot be read: {error.strerror}")
        except UnicodeDecodeError as error:
            return self._bad(str(path), f"is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start}")
        if not text:
            return self._bad(str(path), "is empty")
        yield text

    def _read_jsonl(self, path: Path) -> Iterator[str]:
        lines = 0
        try:
            with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as stream:
                for number, line in enumerate(stream, start=1):
                    if line.strip():
                        lines += 1
                        text, reason = _text_of_line(line, self.text_key)
                        if reason:
                            self._bad(f"{path}, line {number}", reason)
                        else:
                            yield text
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            return self._bad(str(path), f"is a broken gzip file: {error}")
        except OSError as error:
            return self._bad(str(path), f"cannot be read: {error.strerror}")
        if not lines:
            self._bad(str(path), "is empty")


def open_corpus(domain: str, paths: Sequence[str | Path], text_key: str = "text", skip_bad: bool = False) -> Corpus:
    """The documents below `paths`: files, directories (walked in sorted order) and `builtin:NAME` (see `builtin`).

    In a directory, hidden names, files of unknown suffix and empty files are left out; a file named here is read whatever its
    suffix. Raises FlextronError on a path that does not exist and on a directory without a readable file, `skip_bad` or not.
    """
    corpus = Corpus(domain, [], text_key=text_key, skip_bad=skip_bad)
    for entry in paths:
        if builtin.is_builtin(entry):
            corpus.sources.append(str(entry))
            continue
        path = Path(entry).expanduser()
        if path.is_dir():
            known, ignored = _walk(path)
            if not known:
                raise FlextronError(f"{path}: no file to read in this directory ({ignored} of unknown suffix or empty)")
            corpus.sources += known
            corpus.ignored += ignored
        elif path.exists():
            corpus.sources.append(path)
        else:
            raise FlextronError(f"{path}: no such file or directory (input of domain '{domain}')")
    return corpus


def _walk(root: Path) -> tuple[list[Path], int]:
    known: list[Path] = []
    ignored = 0
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            path = Path(folder, name)
            if name.lower().endswith(JSONL_SUFFIXES + TEXT_SUFFIXES) and not (path.exists() and path.stat().st_size == 0):
                known.append(path)
            else:
                ignored += 1
    return known, ignored


def _text_of_line(line: bytes, key: str) -> tuple[str, str]:
    """(text, "") of one line of jsonl, or ("", what is wrong with it)."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return "", f"is not UTF-8 text: byte 0x{error.object[error.start]:02x} at offset {error.start} of the line"
    except json.JSONDecodeError as error:
        return "", f"is not valid JSON: {error.msg} at column {error.colno}"
    except RecursionError:
        return "", "is not valid JSON: too deeply nested"
    if not isinstance(row, dict):
        return "", f"is not a JSON object but a {type(row).__name__}"
    if key not in row:
        return "", f"has no key '{key}'{nearest(key, row)}: set text_key"
    text = row[key]
    if not isinstance(text, str):
        return "", f"key '{key}' is not a string but a {type(text).__name__}"
    if not text:
        return "", f"key '{key}' is empty"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "", f"key '{key}' holds half of a surrogate pair, which is not text"
    return text, ""
