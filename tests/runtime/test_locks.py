"""One process at a time writes an output. The second is told which process does, and locks leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime.disk import write_aside
from flextron_mcore.runtime.locks import locked

HOLD = """
import pathlib, sys
from flextron_mcore.runtime.disk import write_aside
with write_aside(pathlib.Path(sys.argv[1])) as folder:
    (folder / "file").write_text("content")
    print("writing", flush=True)
    input()
"""


@contextmanager
def writer(target: Path) -> Iterator[subprocess.Popen]:
    """Another process that is writing `target`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(target)], **pipes) as other:
        assert other.stdout.readline() == "writing\n"
        yield other


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_living_process_writes_is_not_removed(tmp_path):
    target = tmp_path / "out"
    with writer(target) as other:
        with pytest.raises(FlextronError, match=f"out={target}: process {other.pid} on \\S+ is writing to it: wait for its end"):
            with write_aside(target):
                pass
        assert (tmp_path / ".out.tmp" / "file").exists()
        other.communicate("\n")
    assert names(tmp_path) == ["out"] and names(target) == ["file"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    target = tmp_path / "out"
    with writer(target) as other:
        other.send_signal(signal.SIGKILL)
    assert names(tmp_path) == [".out.lock", ".out.tmp"]
    with write_aside(target) as folder:
        assert names(folder) == []
    assert names(tmp_path) == ["out"]


def test_a_link_and_what_it_leads_to_have_one_lock(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with writer(tmp_path / "out") as other:
        with pytest.raises(FlextronError, match="is writing to it"), locked(tmp_path / "link"):
            pass
        other.communicate("\n")


def test_directories_made_for_a_lock_go_with_it(tmp_path):
    with locked(tmp_path / "a" / "b" / "out"):
        assert names(tmp_path / "a" / "b") == [".out.lock"]
        with locked(tmp_path / "a" / "b" / "out" / "inner"):  # an outer lock of this process is enough
            assert names(tmp_path / "a" / "b") == [".out.lock"]
    assert names(tmp_path) == []
    with locked(tmp_path / "a" / "out"):
        (tmp_path / "a" / "out").touch()
    assert names(tmp_path / "a") == ["out"]


def test_a_place_where_no_directory_can_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FlextronError, match=f"out={tmp_path}/file/out: cannot be written: (File exists|Not a directory)"):
        with locked(tmp_path / "file" / "out"):
            pass
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_in_one_that_cannot_be_written_holds_its_lock(tmp_path):
    out = tmp_path / "fixed" / "out"
    out.mkdir(parents=True)
    out.parent.chmod(0o500)
    try:
        with locked(out):
            assert names(out) == [".lock"]
        assert names(out) == []
    finally:
        out.parent.chmod(0o700)
