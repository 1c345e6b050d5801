"""Every test runs as a world of one process on the CPU runtime (or one GPU)."""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from flextron_mcore.cli import prepare_environment

prepare_environment()

import pytest  # noqa: E402
import torch  # noqa: E402

from flextron_mcore.runtime import distributed  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def process_groups():
    distributed.initialize(seed=1234)
    yield
    distributed.shutdown()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(1234)
