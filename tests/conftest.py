"""Every test runs as a world of one process on the CPU runtime (or one GPU)."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from flextron_mcore.cli import _quiet_libraries
from flextron_mcore.runtime import distributed


@pytest.fixture(scope="session", autouse=True)
def process_groups():
    _quiet_libraries()
    distributed.initialize(seed=1234)
    yield
    distributed.shutdown()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1234)
