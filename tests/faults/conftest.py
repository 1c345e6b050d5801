"""Number of kills that the fault tests tried, in pytest's summary."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many kills were tried, of each command."""
    from tests.faults.test_faults import KILLS

    if KILLS:
        each = ", ".join(f"{name} {count}" for name, count in sorted(KILLS.items()))
        terminalreporter.write_line(f"faults: {sum(KILLS.values())} kills in all: {each}")
