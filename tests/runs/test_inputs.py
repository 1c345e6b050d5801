"""An `out` that is, contains or lies inside an input is refused before anything is touched: every stage, every input key."""

from __future__ import annotations

from pathlib import Path

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.runs.inputs import check_inputs
from flextron_mcore.runs.start import run_stage
from flextron_mcore.settings.compose import compose
from flextron_mcore.settings.schema import Key, keys
from flextron_mcore.settings.stages import STAGES

WITHOUT_OUT = ("launch", "status", "verify")
KEYS = [
    (name, key)
    for name, schema in STAGES.items()
    if name not in WITHOUT_OUT
    for key in keys(schema).values()
    if key.limits.role in ("input", "collection")
]


def tree(folder: Path) -> list[tuple[str, float]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def settings(stage: str, key: Key, value: Path, out: Path):
    given: object = [str(value)] if key.type is list else str(value)
    nested: object = given
    for part in reversed(key.name.split(".")):
        nested = {part: nested}
    needed = [key.limits.only] if key.limits.only else []
    return compose(stage, needed, values=[nested, {"out": str(out), "overwrite": True}], partial=True)


@pytest.fixture
def place(tmp_path) -> Path:
    """RUN/input/inner, where input is what a stage wrote, and `link`, which leads to RUN/input."""
    inner = tmp_path / "run" / "input" / "inner"
    inner.mkdir(parents=True)
    (inner.parent / "config.yaml").write_text("stage: elastic\nseed: 1\n")
    (tmp_path / "link").symlink_to(inner.parent)
    return tmp_path


@pytest.mark.parametrize(
    "given, out, words",
    [
        ("run/input", "run/input", "is"),
        ("run/input", "link", "is"),
        ("link", "run/input", "is"),
        ("link/inner", "run/input", "contains"),
        ("run/input/missing/file", "link", "contains"),
        ("run", "link/new", "lies inside"),
    ],
)
@pytest.mark.parametrize("stage, key", KEYS, ids=lambda value: getattr(value, "name", value))
def test_out_and_an_input_do_not_meet(place, stage, key, given, out, words):
    if key.limits.role == "collection" and words == "lies inside":
        words = "would replace or lie in a stage's directory of"
    before = tree(place)
    with pytest.raises(
        FlextronError, match=f"out={place / out}: {words} the input {key.name}={place / given}: choose another out"
    ):
        run_stage(settings(stage, key, place / given, place / out))
    assert tree(place) == before


def test_every_stage_has_its_inputs_declared():
    assert {stage for stage, _ in KEYS} == STAGES.keys() - set(WITHOUT_OUT)
    assert {"checkpoint", "data", "hf", "input", "tokenizer", "latency", "sensitivity", "subnetwork", "run"} <= {
        key.name for _, key in KEYS
    }


def test_links_inside_an_input_are_followed(place):
    """`out` may not be where a link inside an input leads, such as RUN/checkpoints on another disk."""
    disk = place / "disk"
    disk.mkdir()
    (place / "run" / "input" / "checkpoints").symlink_to(disk)
    key = keys(STAGES["evaluate"])["checkpoint"]
    with pytest.raises(FlextronError, match="is the input checkpoint"):
        run_stage(settings("evaluate", key, place / "run" / "input", disk))


def test_a_report_is_a_directory_of_its_run(place):
    """A report may be written into its run, and replaced, but not into or in place of a stage's directory."""
    run = place / "run"
    for before in (False, True):
        check_inputs(compose("report", [f"run={run}", f"out={run}/report", f"overwrite={str(before).lower()}"]))
        (run / "report").mkdir(exist_ok=True)
        (run / "report" / "config.yaml").write_text("stage: report\nseed: 1\n")
    for out in ("input", "input/report", "report/again"):
        with pytest.raises(FlextronError, match="would replace or lie in a stage's directory of the input run="):
            check_inputs(compose("report", [f"run={run}", f"out={run}/{out}", "overwrite=true"]))


def test_the_text_of_this_python_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "builtin").write_text("a file")
    with pytest.raises(FlextronError, match="out=builtin: is a file"):
        run_stage(compose("prepare", ["input=builtin", "out=builtin"]))
