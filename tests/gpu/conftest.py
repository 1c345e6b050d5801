"""Tests of one GPU (`make test-gpu`); skipped without one.

FLEXTRON_GPU_TESTS_ON_CPU=1 runs the same code on the CPU, for work on the tests themselves.
"""

from __future__ import annotations

import os

import pytest
import torch

from flextron_mcore.runtime import distributed

# NVIDIA's containers run fp32 products in TF32, with a mantissa of 10 bits. The variable also stops libraries below PyTorch.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"


def pytest_runtest_setup(item):  # a hook, not a fixture: pytest then reports the reason once, not for every test
    if not torch.cuda.is_available() and os.environ.get("FLEXTRON_GPU_TESTS_ON_CPU") != "1":
        pytest.skip("no CUDA device: GPU tests not run")


@pytest.fixture(autouse=True)
def full_precision():
    """Compute fp32 products in fp32, not in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def device() -> torch.device:
    """Device of the tested models."""
    return distributed.device()
