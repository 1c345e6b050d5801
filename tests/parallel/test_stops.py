"""Ranks whose clocks differ stop, and save, at the same step."""

from __future__ import annotations

import time

from tests.parallel.worker import run_jobs


def decisions() -> dict[str, tuple[int, bool]]:
    """Decisions of this rank where only rank 1 wants to save, needs long to do so, or is late. Call on all ranks."""
    from torch import distributed

    from flextron_mcore.runtime import signals
    from flextron_mcore.runtime.distributed import stop_agreed

    here = distributed.get_rank() == 1
    signals.defer(True)
    signals.limit(None, None, time.time() + 1e6)
    found = {"none": stop_agreed(), "due": stop_agreed(save=here), "slow": stop_agreed(needed=2e6 if here else 1.0)}
    signals.limit(None, time.time() - 1 if here else None)
    found["late"] = stop_agreed()
    signals.limit(None)
    signals.defer(False)
    return found


def test_ranks_agree(tmp_path):
    from flextron_mcore.runtime.signals import JOB_ENDS

    ((first, second),) = run_jobs(2, [{"call": "tests.parallel.test_stops:decisions"}], tmp_path)
    expected = {"none": [0, False], "due": [0, True], "slow": [JOB_ENDS, False], "late": [JOB_ENDS, False]}
    assert first["result"] == second["result"] == expected
