"""Collective calls in one process. tests/parallel makes them on several ranks."""

from __future__ import annotations

import pytest
import torch

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime import distributed, watch
from flextron_mcore.runtime.ranks import drive, is_main_process, on_main_process, place, processes_on_cpu


def test_one_process_is_the_main_process():
    assert place() == (0, 1) and is_main_process()
    assert on_main_process(lambda: "found") == "found"
    with pytest.raises(FlextronError, match="bad input"):
        on_main_process(_refuse)


def test_before_there_are_process_groups_the_launcher_says_who_is_who(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    for rank, expected in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert is_main_process() is expected
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(torch.distributed, "init_process_group", None)
    with processes_on_cpu():  # a single process needs no process group
        pass


def test_ranks_that_do_not_know_each_other_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in set(watch.LAUNCH) - {"WORLD_SIZE"}:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(FlextronError, match="WORLD_SIZE=2, but .* is not set in the environment: start the processes"):
        distributed.initialize()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(FlextronError, match=r"process 1 of this node \(LOCAL_RANK\) sees 1 GPU\(s\): start as many processes"):
        distributed.initialize()


def _refuse() -> None:
    raise FlextronError("bad input")


def test_one_rank_drives():
    asked = []
    assert drive(lambda ask: [ask(1), ask(2)], lambda question: asked.append(question) or 10 * question) == [10, 20]
    assert asked == [1, 2]
