"""What the tests of the report share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flextron_mcore.report import drawing


@pytest.fixture(autouse=True, scope="module")
def coarse() -> Iterator[None]:
    """Small pictures: the tests do not look at pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "DPI", 40)
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """No drawing, which takes most of the time, in tests that are not about pictures."""
    monkeypatch.setattr(drawing, "_render", lambda draw, size, theme: theme.ink.encode())
