"""Freed memory stays with the process for reuse, and Python's garbage collector runs rarely."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys

import pytest

from flextron_mcore.runtime.memory import collect_again, collect_rarely

TOUCH_AGAIN = """
import resource, sys, torch
from flextron_mcore.runtime.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = []
for _ in range(60):  # until freed blocks have the right size
    torch.ones(1 << 24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-11])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keep_freed_memory sets options of glibc's malloc")
def test_dropped_memory_is_used_again():
    """Page faults of ten allocations of 64 MiB. If free() gave memory back to the kernel, each would fault on 16384 new pages."""
    faults = {}
    for what in ("keep", "usual"):
        found = subprocess.run([sys.executable, "-c", TOUCH_AGAIN, what], capture_output=True, text=True, check=True)
        faults[what] = int(found.stdout)
    assert faults["keep"] < 100 and faults["keep"] <= faults["usual"]


def test_garbage_is_looked_for_as_before():
    collect_again()  # a test before may have run a command in this process, which calls collect_rarely
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
