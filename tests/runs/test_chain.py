"""Commands that a chain prints are read back, by the parser, with the same values."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from flextron_mcore.runs.chain import quoted
from flextron_mcore.settings.compose import compose


@settings(deadline=None)
@given(st.text(st.sampled_from("ab \\'\",[]{}:=$"), min_size=1, max_size=8))
def test_a_quoted_value_is_read_back(value):
    assert compose("evaluate", [f"checkpoint={quoted(value)}"], partial=True).checkpoint == value
