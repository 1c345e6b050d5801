"""Files and directories are written whole or not at all."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime import disk
from flextron_mcore.runtime.disk import disk_errors, forget, publish, recover, write_aside, write_whole


@pytest.mark.parametrize("linked", [False, True])
def test_a_directory_is_replaced_when_the_new_one_is_whole(tmp_path, linked):
    place = tmp_path / "elsewhere" / "place"
    place.mkdir(parents=True)
    (place / "old").touch()
    target = tmp_path / "link" if linked else place
    if linked:
        target.symlink_to(place)
    with pytest.raises(KeyboardInterrupt), write_aside(target) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert [path.name for path in place.iterdir()] == ["old"]
    for _ in range(2):
        with write_aside(target) as folder:
            (folder / "new").touch()
        assert [path.name for path in place.iterdir()] == ["new"]
    assert target.is_symlink() is linked and [path.name for path in place.parent.iterdir()] == ["place"]


def test_a_small_file_is_replaced_at_once(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    write_whole(file, "old")
    write = Path.write_text

    def half(self, text, **options):
        write(self, text[:1], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_write_aside_leaves_nothing_or_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), write_aside(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with write_aside(target) as folder:
        (folder / "whole").write_text("1")
    with write_aside(target) as folder:
        (folder / "whole").write_text("2")
    assert (target / "whole").read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_forgetting_a_file_keeps_what_is_in_it(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.write(b"one")
        file.flush()
        forget(file.name)
        file.write(b", two")
    forget(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"one, two"


@pytest.mark.parametrize("published", [False, True])
def test_a_replacement_that_a_kill_interrupted_is_undone_or_finished(tmp_path, published):
    """`publish` is killed just after the old directory was renamed away, or before it is removed."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    aside = tmp_path / ".out.tmp"
    aside.mkdir()
    (aside / "file").write_text("new")
    out.rename(tmp_path / ".out.old")
    if published:
        aside.rename(out)
    recover(out)
    assert (out / "file").read_text() == ("new" if published else "old")
    assert not (tmp_path / ".out.old").exists()


def test_a_directory_that_cannot_be_published_leaves_the_old_one(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "missing", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "file").read_text() == "old"


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_directory_replaces_another(tmp_path, monkeypatch, exchanged):
    """Two names are exchanged atomically where the file system can; elsewhere the old directory is first renamed to .NAME.old."""
    out, aside, seen = tmp_path / "out", tmp_path / ".out.tmp", []
    for folder, text in ((out, "old"), (aside, "new")):
        folder.mkdir()
        (folder / "file").write_text(text)
    if not exchanged:
        monkeypatch.setattr(disk, "_exchange", lambda one, other: False)
    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: (seen.append((path.name, path.exists())), rmtree(path, True)))
    publish(aside, out)
    assert (out / "file").read_text() == "new" and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert seen[-1] == (".out.tmp" if exchanged else ".out.old", True)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        RuntimeError("Worker failure: [Errno 5] Input/output error"),  # from a process that writes a part of a checkpoint
    ],
)
def test_a_disk_error_is_a_line_naming_the_target(tmp_path, error):
    with pytest.raises(FlextronError, match="out: cannot be written: Input/output error; nothing was changed"):
        with disk_errors(tmp_path / "out"):
            raise error


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/elsewhere/input.txt"),
        RuntimeError("Worker failure: [Errno 13] Permission denied: '/elsewhere/input.txt'"),
        RuntimeError("Worker failure: [Errno 2] No such file or directory"),
    ],
)
def test_other_errors_pass_unchanged(tmp_path, error):
    with pytest.raises(type(error), match="denied|No such"):
        with disk_errors(tmp_path / "out"):
            raise error
