"""Progress as lines, where standard output is no terminal."""

from __future__ import annotations

import contextlib
import io

import pytest

from flextron_mcore.runtime import progress
from flextron_mcore.runtime.progress import Progress, duration_text


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_at_the_start_and_one_a_minute_with_the_time_left(clock, capsys):
    with Progress(total=100, desc="router", unit="network") as bar:
        for _ in range(100):
            clock[0] += 7
            bar.update()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "router: 0 of 100 networks"
    assert lines[1] == "router: 9 of 100 networks, 11 min left"
    assert len(lines) == 1 + 99 // 9  # a line every 9 networks (63 s), except at the end


def test_short_work_prints_its_start_only(clock, capsys):
    with Progress(total=3, desc="import", unit="B", unit_scale=True) as bar:
        bar.update(3)
    assert capsys.readouterr().out == "import: 0.00 of 3.00 B\n"


def test_bytes_have_a_rate(clock, capsys):
    with Progress(total=3e9, desc="tokenizing", unit="B", unit_scale=True) as bar:
        clock[0] += 100
        bar.update(1e9)
    assert capsys.readouterr().out.splitlines()[1] == "tokenizing: 1.00G of 3.00G B, 10.0MB/s, 3 min left"


def test_the_total_may_come_later(clock, capsys):
    with Progress(desc="evaluate") as bar:
        bar.reset(4)
        clock[0] += 61
        bar.update()
    assert capsys.readouterr().out.splitlines() == ["evaluate: 0 of 4 evaluations", "evaluate: 1 of 4 evaluations, 3 min left"]


def test_lines_reach_the_terminal_while_a_librarys_output_is_caught(clock, capsys):
    with Progress(desc="evaluate: tasks", unit="request") as bar, contextlib.redirect_stdout(io.StringIO()) as caught:
        clock[0] += 61
        bar.update(2)
    assert capsys.readouterr().out.splitlines() == ["evaluate: tasks: 2 requests"] and caught.getvalue() == ""


def test_other_ranks_print_nothing(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "is_main_process", lambda: False)
    with Progress(total=3, desc="x") as bar:
        clock[0] += 100
        bar.update()
    assert capsys.readouterr().out == ""


def test_durations():
    assert [duration_text(s) for s in (3, 89, 300, 7200)] == ["3 s", "89 s", "5 min", "2.0 h"]
