"""Checksums that a download from the Hugging Face Hub leaves beside its files."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flextron_mcore.config import FlextronError

_CHECKSUM = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def check_download(files: Iterable[Path]) -> int:
    """Compare files with the checksums that a download from the Hugging Face Hub left; return the number of files that have one.

    The Hub's cache names a file by its checksum (SNAPSHOT/FILE is a link to blobs/CHECKSUM); `hf download --local-dir` writes the
    checksum to .cache/huggingface/download/FILE.metadata. The checksum of a large file is its SHA-256, of a small one git's
    SHA-1. Raises FlextronError naming the first file that differs.
    """
    known = {file: checksum for file in files if (checksum := _recorded(file))}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, same in zip(known, pool.map(_is_same, known, known.values()), strict=True):
            if not same:
                raise FlextronError(f"{file}: is not the file that was downloaded (its checksum differs): download it again")
    return len(known)


def _recorded(file: Path) -> str | None:
    """Checksum that the Hub's download recorded for a file, SHA-256 or git's SHA-1 in hexadecimal; None without one."""
    real = file.resolve()
    if file.is_symlink() and real.parent.name == "blobs":
        found = real.name
    else:
        record = file.parent / ".cache" / "huggingface" / "download" / f"{file.name}.metadata"
        try:
            _, found, *_ = record.read_text(encoding="utf-8").splitlines()  # commit, checksum, time
        except (OSError, ValueError):
            return None
    return found if _CHECKSUM.fullmatch(found) else None


def _is_same(file: Path, checksum: str) -> bool:
    """True if the file has this checksum: SHA-256 if it has 64 digits, else git's SHA-1 of a blob."""
    with file.open("rb") as stream:
        if len(checksum) == 64:
            return hashlib.file_digest(stream, "sha256").hexdigest() == checksum
        size = os.fstat(stream.fileno()).st_size
        return hashlib.sha1(b"blob %d\0" % size + stream.read()).hexdigest() == checksum
