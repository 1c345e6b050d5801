"""Commands killed, or with a failing disk, at any file-system event: typed again, they give the bytes of an undisturbed run.

`make faults` tries FLEXTRON_FAULTS events of every command; without it only those of SAMPLE are tried.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from flextron_mcore.settings.stages import STAGES
from tests.faults.harness import ERRORS, Done, Event, Harness, contents, empty, moments
from tests.faults.scenarios import CONTINUING, NAMES, OVERWRITTEN, TRAINING, commands, make_inputs, only_reading

COUNT = int(os.environ.get("FLEXTRON_FAULTS", "0"))
KILLS: Counter[str] = Counter()  # kills of each command whose bytes were equal afterwards, for the summary (conftest.py)
SAMPLE = {"prepare": 1, "elastic": 1, "export": 1, "select": 1}  # number of events without `make faults`; takes about a minute
pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="the shim is compiled with gcc")


class Bench:
    """Runs each command once undisturbed, and then again and again under a fault."""

    def __init__(self, harness: Harness, folder: Path) -> None:
        self.harness, self.inputs, self.work, self.old = harness, folder / "inputs", folder / "work", folder / "old"
        self.commands = commands(self.inputs, self.work / "out")
        self.whole: dict[str, tuple[list[Event], dict[str, bytes]]] = {}

    def undisturbed(self, name: str) -> tuple[list[Event], dict[str, bytes]]:
        """Events of a command that nothing disturbs, and the files that it leaves."""
        if name not in self.whole:
            empty(self.work)
            done = self.run(name)
            assert done.code == 0 and not done.errors, done
            self.whole[name] = done.events, contents(self.work)
        return self.whole[name]

    def run(self, name: str, at: int = 0, error: int = 0) -> Done:
        return self.harness.run(self.commands[name], self.work, at, error)

    def kill(self, name: str, at: int, *more: str) -> bool:
        """Kill the command at an event; False if it ends before. A process that a `launch` waits for dies with it."""
        done = self.harness.run([*self.commands[name], *more], self.work, at)
        assert done.code < 0 or len(done.events) < at, (name, at, done)
        KILLS[name] += done.code < 0
        return done.code < 0

    def keep_old(self, name: str) -> dict[str, bytes]:
        """Make an older result where the command writes, keep a copy of it, and return its files."""
        empty(self.work)
        assert self.run(name).code == 0
        out = self.work / "out"
        (out / "old" if out.is_dir() else out).write_text("old")
        shutil.rmtree(self.old, ignore_errors=True)
        shutil.copytree(self.work, self.old, symlinks=True)
        return contents(self.work)

    def put_old(self) -> None:
        """Put the result that `keep_old` copied back into the working directory."""
        empty(self.work)
        shutil.copytree(self.old, self.work, symlinks=True, dirs_exist_ok=True)

    def assert_same_after(self, name: str, what: object, *more: str, expected: dict[str, bytes] | None = None) -> None:
        """Run the command again after a fault, and assert that its files are those of an undisturbed run.

        It must succeed, or refuse a result that was complete before.

        Args:
            name: name of the command.
            what: the fault, for the message.
            more: further arguments of the command.
            expected: {path: content} to compare with; None: of the undisturbed run.
        """
        expected = expected or self.undisturbed(name)[1]
        before = contents(self.work)
        done = self.harness.run([*self.commands[name], *more], self.work)
        if done.code == 2 and _of_out(before) == _of_out(expected):  # the kill came after the result was complete
            assert len(done.errors) == 1 and re.search("exists already|is complete", done.errors[0]), (what, done)
        else:
            assert done.code == 0, (what, done.errors)
        found = contents(self.work)
        different = sorted(file for file in expected.keys() | found.keys() if expected.get(file) != found.get(file))
        assert not different, (what, different)


@pytest.fixture(scope="module")
def bench(tmp_path_factory, text) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("faults").resolve()
    with Harness(folder) as harness:
        made = Bench(harness, folder)
        make_inputs(harness, text, made.inputs)
        yield made


def _names(sampled: dict[str, int]) -> list[str]:
    return [name for name in NAMES if COUNT or sampled.get(name)]


@pytest.mark.parametrize("name", _names(SAMPLE))
def test_a_killed_command_typed_again_gives_the_same_bytes(bench, name):
    events, _ = bench.undisturbed(name)
    for event in moments(events, COUNT or SAMPLE[name], first=NAMES.index(name)):
        empty(bench.work)
        assert bench.kill(name, event.number), event
        bench.assert_same_after(name, event)


@pytest.mark.parametrize("name", NAMES if COUNT else ["import"])
def test_a_continued_command_killed_again_gives_the_same_bytes(bench, name):
    events, _ = bench.undisturbed(name)
    for first, second in _pairs(events, (COUNT + 1) // 2 or 1, NAMES.index(name)):
        empty(bench.work)
        assert bench.kill(name, first.number), first
        if bench.kill(name, second):
            bench.kill(name, (second + 1) // 2)
        bench.assert_same_after(name, (first, second))


def _pairs(events: list[Event], count: int, first: int) -> Iterator[tuple[Event, int]]:
    """Yield (event of the first kill, in the second half of the run; number of the event at which the run after it is killed)."""
    for i, event in enumerate(moments(events[len(events) // 2 :], count, first)):
        yield event, 1 + (first + 7 * i * i) % len(events)


@pytest.mark.parametrize("name", OVERWRITTEN if COUNT else ["export", "select"])
def test_a_killed_replacement_leaves_the_old_or_the_new_whole(bench, name):
    """After a kill, `out` is the old result or the new one, or, of a command that continues in `out`, the new one's beginning."""
    more = "overwrite=true"
    old = bench.keep_old(name)
    events = bench.harness.run([*bench.commands[name], more], bench.work).events
    expected = contents(bench.work)
    publishing = [event for event in events if event.kind in ("rename", "unlink") and event.path.count("/") < 3]
    for event in sorted({*moments(events, COUNT // 2, NAMES.index(name)), *moments(publishing, COUNT or 2)}):
        bench.put_old()
        assert bench.kill(name, event.number, more), event
        found, *whole = (_of_out(files) for files in (contents(bench.work), old, expected))
        begun = name in CONTINUING and "out/old" not in found and "out/config.yaml" in found
        assert begun or found in whole, (event, sorted(found))
        bench.assert_same_after(name, event, more, expected=expected)


def _of_out(files: dict[str, bytes]) -> dict[str, bytes]:
    return {file: content for file, content in files.items() if file.startswith("out")}


def test_every_stage_is_tried():
    tried = {argv[0] for argv in commands(Path(), Path()).values()}
    assert STAGES.keys() - tried <= {"status", "verify"}, "these write nothing"


@pytest.mark.parametrize("name", only_reading(Path(), Path()))
def test_a_command_without_a_result_writes_nothing(bench, name):
    """Commands without a result cause no file-system events, so a kill cannot leave anything behind."""
    empty(bench.work)
    done = bench.harness.run(only_reading(bench.inputs, bench.work / "out")[name], bench.work)
    named = [event for event in done.events if event.path]  # a file without a name tries whether a directory can be written
    assert done.code == 0 and not named and not list(bench.work.iterdir()), done


@pytest.mark.parametrize("name", TRAINING if COUNT else ["elastic"])
def test_a_run_killed_between_its_last_checkpoint_and_its_metrics_finishes(bench, name):
    """The continued run has no step left, and so no validation of its own."""
    events, _ = bench.undisturbed(name)
    published = [event for event in events if event.kind == "rename" and event.path.endswith("/iter_0000004")]
    after = [event for event in events if event.number > published[-1].number]
    assert any(event.kind == "unlink" and "iter_" in event.path for event in after)  # the earlier checkpoint is removed
    for event in moments(after, COUNT or 1, first=1):
        empty(bench.work)
        assert bench.kill(name, event.number), event
        bench.assert_same_after(name, event)


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", NAMES if COUNT else ["elastic"])
def test_a_failing_disk_is_one_line_and_the_command_succeeds_afterwards(bench, name, code):
    events, expected = bench.undisturbed(name)
    kinds = ERRORS[code][0].split()
    for event in moments([event for event in events if event.kind in kinds], COUNT or 1, first=code):
        empty(bench.work)
        done = bench.run(name, event.number, code)
        assert len(done.errors) <= 1 + (name == "launch") and "Traceback" not in done.output, (event, done)
        if done.code == 0:  # the failed call was not needed, such as the note of a lock's holder
            assert contents(bench.work) == expected, event
            continue
        assert done.errors and done.code in (1, 2), (event, done)  # two lines only of `launch`, whose job has a line of its own
        out = bench.work / "out"
        if name not in CONTINUING:
            assert not out.exists(), event
        assert not [path for path in bench.work.rglob(".*.tmp")], event
        bench.assert_same_after(name, event)
