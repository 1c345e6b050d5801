"""The optimizer that replaces FusedAdam on a CPU computes what torch's Adam and AdamW compute."""

from __future__ import annotations

import pytest
import torch

from flextron_mcore.runtime.adam import FusedAdam


@pytest.mark.parametrize("decoupled", [True, False])
def test_fused_adam_equals_torchs_adam(decoupled):
    settings = dict(lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ours, theirs = ([torch.nn.Parameter(torch.randn(5, 7)), torch.nn.Parameter(torch.randn(3))] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        b.data.copy_(a.data)
    adam = FusedAdam([{"params": ours[:1]}, {"params": ours[1:], "weight_decay": 0.0}], adam_w_mode=decoupled, **settings)
    reference = torch.optim.AdamW if decoupled else torch.optim.Adam
    expected = reference([{"params": theirs[:1]}, {"params": theirs[1:], "weight_decay": 0.0}], **settings)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        adam.step()
        expected.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(set(state) == {"exp_avg", "exp_avg_sq"} for state in adam.state.values())
    assert [group["step"] for group in adam.param_groups] == [5, 5]
