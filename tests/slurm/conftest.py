"""The Slurm cluster of these tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of two nodes. Skips where Slurm is not installed, and fails there if FLEXTRON_REQUIRE_SLURM=1."""
    if problem := missing():
        if os.environ.get("FLEXTRON_REQUIRE_SLURM") == "1":
            pytest.fail(problem, pytrace=False)
        pytest.skip(problem)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
