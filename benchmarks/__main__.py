"""`python -m benchmarks [NAME ...]`: run the named benchmarks, or all of BENCHMARKS, one after another.

average_time, equal_time and modelopt take paths of trained runs, so each is a command of its own: `python -m benchmarks.NAME`.
"""

from __future__ import annotations

import importlib
import os
import sys

BENCHMARKS = ("slice", "step", "gradients", "ranks", "stream", "dispatch", "export", "llama_cpp", "hygiene")

os.environ.setdefault("OMP_NUM_THREADS", "1")


def main() -> None:
    names = sys.argv[1:] or list(BENCHMARKS)
    for name in names:
        if name not in BENCHMARKS:
            sys.exit(f"unknown benchmark '{name}': use any of {', '.join(BENCHMARKS)}")
    from flextron_mcore.config import FlextronError
    from flextron_mcore.runtime.environment import prepare_environment

    prepare_environment()
    try:
        for name in names:
            importlib.import_module(f"benchmarks.{name}").run()
    except FlextronError as error:
        sys.exit(f"benchmarks: {error}")


if __name__ == "__main__":
    main()
