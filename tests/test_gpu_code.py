"""The GPU tests (tests/gpu) run on the CPU, so that they do not break unnoticed where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu is tested on the GPU")
def test_the_gpu_tests_run():
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCH and "PYTEST" not in name}
    # test_latency.py is left out: it measures, and would fail on a busy CPU.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu", "--ignore=tests/gpu/test_latency.py"]
    environment |= {"FLEXTRON_GPU_TESTS_ON_CPU": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    summary = result.stdout.splitlines()[-1]
    assert result.returncode == 0 and "passed" in summary, result.stdout[-3000:] + result.stderr[-1000:]
