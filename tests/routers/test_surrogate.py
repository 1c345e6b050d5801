"""The surrogate model of the loss."""

from __future__ import annotations

import pytest
import torch

from flextron_mcore.routers.surrogate import Surrogate


def test_replaced_is_what_forward_gives_for_the_replaced_choice():
    torch.manual_seed(0)
    surrogate = Surrogate(5, 3, 16)
    surrogate.scale.fill_(0.3)
    indices = torch.randint(3, (4, 5))
    choices = torch.nn.functional.one_hot(indices, 3).float()
    found = surrogate.replaced(choices)
    assert found.shape == (4, 5, 3)
    for b in range(4):
        assert found[b].gather(-1, indices[b][:, None]).flatten().tolist() == pytest.approx(
            surrogate(choices[b : b + 1]).expand(5).tolist(), rel=1e-4
        )
        for n in range(5):
            for k in range(3):
                other = indices[b].clone()
                other[n] = k
                one_hot = torch.nn.functional.one_hot(other[None], 3).float()
                assert found[b, n, k].item() == pytest.approx(surrogate(one_hot).item(), rel=1e-4, abs=1e-6)
