"""What another version of Python or Megatron-Core wrote is read."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from flextron_mcore.runtime import compat


def test_paths_of_python_3_13(monkeypatch):
    if sys.version_info < (3, 13):
        monkeypatch.delitem(sys.modules, "pathlib._local", raising=False)
    compat.know_paths()
    # pickle.dumps(Path("a/b"), 0) of Python 3.13
    assert pickle.loads(b"cpathlib._local\nPosixPath\np0\n(Va/b\np1\ntp2\nRp3\n.") == Path("a/b")
