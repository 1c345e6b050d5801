"""Checksums of a download: in the Hub's cache, and beside a directory that `hf download --local-dir` filled."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from flextron_mcore.checkpoint.downloads import check_download
from flextron_mcore.config import FlextronError

CONTENT = {"model.safetensors": b"weights", "config.json": b"{}"}


def checksum(name: str) -> str:
    data = CONTENT[name]
    if name == "model.safetensors":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # as `git hash-object` has it


def cached(folder: Path) -> list[Path]:
    """Snapshot of the Hub's cache: links to blobs."""
    snapshot, blobs = folder / "snapshots" / "abc", folder / "blobs"
    for each in (snapshot, blobs):
        each.mkdir(parents=True)
    for name, data in CONTENT.items():
        (blobs / checksum(name)).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{checksum(name)}")
    return [snapshot / name for name in CONTENT]


def local(folder: Path) -> list[Path]:
    """Directory of a download, with its record of each file: commit, checksum and time."""
    records = folder / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    for name, data in CONTENT.items():
        (folder / name).write_bytes(data)
        (records / f"{name}.metadata").write_text(f"{'a' * 40}\n{checksum(name)}\n1700000000.5\n")
    return [folder / name for name in CONTENT]


def test_checksums_are_those_of_git():
    assert checksum("config.json") == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # printf '{}' | git hash-object --stdin


@pytest.mark.parametrize("download", [cached, local])
@pytest.mark.parametrize("name", CONTENT)
def test_a_changed_download_is_refused(tmp_path, download, name):
    files = download(tmp_path)
    assert check_download(files) == 2
    file = next(file for file in files if file.name == name).resolve()
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    with pytest.raises(FlextronError, match=rf"{name}: is not the file that was downloaded \(its checksum differs\)"):
        check_download(files)


def test_files_without_a_checksum_are_not_compared(tmp_path):
    for name, data in CONTENT.items():
        (tmp_path / name).write_bytes(data)
    records = tmp_path / ".cache" / "huggingface" / "download"
    records.mkdir(parents=True)
    (records / "config.json.metadata").write_text("half a record")
    assert check_download(tmp_path / name for name in CONTENT) == 0
