"""Parameters that are gathered for a validation or checkpoint: DDP's hooks are back afterwards, also after an error."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flextron_mcore.training.build import TrainedModel


def test_hooks_are_back_after_an_error_while_parameters_are_gathered():
    calls: list[str] = []
    chunk = SimpleNamespace(
        disable_forward_pre_hook=lambda: calls.append("off"), enable_forward_pre_hook=lambda: calls.append("on")
    )
    model = SimpleNamespace(chunks=[chunk], overlap=True)
    with pytest.raises(ValueError, match="disk"), TrainedModel.gathered(model):
        raise ValueError("disk")
    assert calls == ["off", "on"]
