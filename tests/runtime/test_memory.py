"""When Python looks for garbage."""

from __future__ import annotations

import gc

from flextron_mcore.runtime.memory import collect_again, collect_rarely


def test_garbage_is_looked_for_as_before():
    collect_again()  # after a test that ran the command in this process
    usual, frozen = gc.get_threshold(), gc.get_freeze_count()
    try:
        collect_again()
        assert (gc.get_threshold(), gc.get_freeze_count()) == (usual, frozen)
        collect_rarely()
        collect_rarely()
        assert gc.get_threshold()[0] > usual[0]
        collect_again()
        assert gc.get_threshold() == usual
        assert gc.get_freeze_count() > frozen
        collect_again()
        assert gc.get_threshold() == usual
    finally:
        gc.unfreeze()
