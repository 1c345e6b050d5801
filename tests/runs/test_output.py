"""Output directory of a stage: it is locked while it is written, and a refused command leaves nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.runs.output import check_output, new_directory
from flextron_mcore.runs.start import run_stage
from flextron_mcore.runtime.disk import check_space
from flextron_mcore.settings.compose import compose
from flextron_mcore.settings.schema import keys
from flextron_mcore.settings.stages import STAGES

WRITING = [name for name in STAGES if name not in ("launch", "status", "verify")]
HOLD = "import pathlib, sys; from flextron_mcore.runtime.locks import locked\n"
HOLD += "with locked(pathlib.Path(sys.argv[1])): print('locked', flush=True); input()"


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    """(an `out` that another process writes, id of that process)."""
    out = tmp_path_factory.mktemp("held") / "out"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        yield out, other.pid
        other.communicate("\n")


@pytest.mark.parametrize("stage", WRITING)
def test_the_second_of_two_commands_is_told_who_writes(held, stage):
    out, pid = held
    message = f"out={out}: process {pid} on \\S+ is writing to it: wait for its end, or choose another out"
    with pytest.raises(FlextronError, match=message):
        run_stage(compose(stage, values=[{"out": str(out), "overwrite": True}], partial=True))
    assert [path.name for path in out.parent.iterdir()] == [".out.lock"]


@pytest.mark.parametrize("stage", [name for name in WRITING if name != "quickstart"])
def test_a_refused_command_leaves_no_lock_and_no_directory(tmp_path, stage):
    names = [name for name in ("checkpoint", "data", "hf", "run", "input") if name in keys(STAGES[stage])]
    known = {name: str(tmp_path / "missing") for name in names}
    with pytest.raises(FlextronError, match="missing"):
        run_stage(compose(stage, values=[known, {"out": str(tmp_path / "new" / "folder" / "out")}], partial=True))
    assert list(tmp_path.iterdir()) == []


def test_another_directory_is_refused_without_a_trace(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    run.mkdir()
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(FlextronError, match="was not written by flextron"):
        run_stage(compose("report", [f"run={run}", f"out={out}", "overwrite=true"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"] and os.listdir(out) == ["thesis.txt"]


def test_a_mount_is_emptied_and_not_renamed(make_disk):
    out = make_disk("1m")
    with new_directory(out) as folder:
        (folder / "config.yaml").write_text("stage: elastic\n")
    (out / "metrics.json").write_text("{}")
    (out / "folder").mkdir()
    check_output(out, overwrite=True)
    with new_directory(out) as folder:
        assert folder == out and not os.listdir(out)


def test_sizes_are_shown_in_units_that_tell_them_apart(tmp_path, monkeypatch):
    """The refusal of a full disk gives sizes in MiB or KiB where they would be 0.00 GiB."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    for need, text in ((1_300_000, "1.24 MiB needed, 0 bytes free"), (3 * 2**30, "3 GiB needed"), (70, "70 bytes needed")):
        with pytest.raises(FlextronError, match=text):
            check_space(tmp_path, need)
