"""The Slurm cluster of these tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.launched import BUDGETS, launch, pretraining
from tests.stages.conftest import stage


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of two nodes. Skips where Slurm is not installed, and fails there if FLEXTRON_REQUIRE_SLURM=1."""
    if problem := missing():
        if os.environ.get("FLEXTRON_REQUIRE_SLURM") == "1":
            pytest.fail(problem, pytrace=False)
        pytest.skip(problem)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def bare(slurm, tmp_path_factory) -> Path:
    """Results directory of the whole chain, run without containers."""
    base = tmp_path_factory.mktemp("bare") / "odd 'one' $(id);&é"
    code, out, err = launch(slurm, base, "cluster=slurm", BUDGETS)
    assert code == 0, out + err
    return base / "smoke"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Data of the smoke model."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    stage("prepare", "input=builtin", "vocab_size=512", f"out={out}")
    return out


@pytest.fixture(scope="session")
def undisturbed(slurm, prepared, tmp_path_factory) -> Path:
    """Results directory of a pretraining that nothing interrupted."""
    base = tmp_path_factory.mktemp("undisturbed")
    code, out, err = launch(slurm, base, *pretraining(prepared))
    assert code == 0, out + err
    return base / "smoke"
