"""Tests of one GPU (`make test-gpu`): skipped where there is none.

FLEXTRON_GPU_TESTS_ON_CPU=1 runs the same code on the CPU: for work on these tests, it says nothing about a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

from flextron_mcore.runtime import distributed

# NVIDIA's containers let fp32 products run in TF32, which keeps 10 bits. This also tells the libraries under PyTorch not to.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"


def pytest_runtest_setup(item):  # not a fixture: pytest then tells it once, not for every test
    if not torch.cuda.is_available() and os.environ.get("FLEXTRON_GPU_TESTS_ON_CPU") != "1":
        pytest.skip("no CUDA device: GPU tests not run")


@pytest.fixture(autouse=True)
def full_precision():
    """fp32 products in fp32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def device() -> torch.device:
    """Where the tested models are."""
    return distributed.device()
