"""Fixtures of the tests of launching."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flextron_mcore import cli
from flextron_mcore.settings.launch import LaunchSettings


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., LaunchSettings]:
    """Function from arguments of `flextron launch` to its settings."""

    def composed(*arguments: str) -> LaunchSettings:
        seen: list[LaunchSettings] = []
        runs, cli.run_stage = cli.run_stage, seen.append
        try:
            cli._main(["launch", f"base_results_dir={tmp_path}/results", f"data_dir={tmp_path}/data", *arguments])
        finally:
            cli.run_stage = runs
        return seen[0]

    return composed
