"""Fixtures of the report's tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
from matplotlib.figure import Figure

from flextron_mcore.report import drawing


@pytest.fixture(autouse=True, scope="module")
def coarse() -> Iterator[None]:
    """Draw small pictures, because the tests do not look at pixels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "DPI", 40)
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip drawing, which takes most of the time, in tests that are not about pictures."""
    monkeypatch.setattr(drawing, "_render", lambda draw, size, theme: theme.ink.encode())


@pytest.fixture
def drawn_by(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Figure]:
    """The matplotlib figure that a function of a topic draws: drawn_by(topic module, function, *arguments)."""

    def draw_once(module: ModuleType, make: Callable, *arguments: object) -> Figure:
        kept = []
        with monkeypatch.context() as patch:
            patch.setattr(module, "picture", lambda name, alt, caption, draw, *size: kept.append(draw))
            make(*arguments)
        figure = Figure()
        kept[0](figure, drawing.LIGHT)
        return figure

    return draw_once
