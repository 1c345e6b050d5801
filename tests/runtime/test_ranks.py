"""What ranks do together; with several processes it is tested in tests/parallel."""

from __future__ import annotations

import pytest
import torch

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime.ranks import is_main_process, on_main_process, place, processes_on_cpu


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
    with processes_on_cpu():  # one process needs none
        pass


def _refuse() -> None:
    raise FlextronError("bad input")
