"""Precision that a stage computes in by default."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flextron_mcore.runs import opened


@pytest.mark.parametrize(
    "given, stored, fast, expected, said",
    [
        (None, "bf16", False, "bf16", True),
        (None, "bf16", True, "bf16", False),
        (None, "fp32", False, "fp32", False),
        (None, "fp16", False, "fp32", False),
        ("bf16", "fp32", False, "bf16", False),
        ("fp32", "bf16", False, "fp32", False),
    ],
)
def test_precision(monkeypatch, capsys, given, stored, fast, expected, said):
    """The default is the checkpoint's precision, fp32 for fp16. A line advises fp32 if it is bf16 and the CPU is slow at that."""
    monkeypatch.setattr(opened, "device", lambda: SimpleNamespace(type="cpu"))
    monkeypatch.setattr(opened, "_bf16_instructions", lambda: fast)
    settings = SimpleNamespace(trainer=SimpleNamespace(precision=given))
    assert opened.precision(settings, SimpleNamespace(dtype=stored)) == expected
    assert ("trainer.precision=fp32 is faster" in capsys.readouterr().out) == said
    monkeypatch.setattr(opened, "device", lambda: SimpleNamespace(type="cuda"))
    assert opened.precision(settings, SimpleNamespace(dtype=stored)) == expected
    assert not capsys.readouterr().out


def test_instructions_are_known():
    assert opened._bf16_instructions() in (True, False)
