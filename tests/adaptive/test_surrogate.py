"""The surrogate of a token's loss learns a known loss, and predicts the loss of every level for each token."""

from __future__ import annotations

import torch

from flextron_mcore.adaptive.routers import AdaptiveRouters
from flextron_mcore.adaptive.routing import AdaptiveRouting, Trace
from flextron_mcore.adaptive.surrogate import TokenSurrogate
from flextron_mcore.routers.static import StaticRouters
from flextron_mcore.settings.sections import SurrogateSettings
from tests.routing_toy import family

LENGTH, BATCH = 32, 4


def test_surrogate_predicts_the_loss_of_levels_for_each_token():
    """Only block 1 matters, and only to tokens whose final hidden state is positive in channel 0; full losses differ by token."""
    torch.manual_seed(0)
    choices = family(1)
    channels = choices.model.hidden_size
    routing = AdaptiveRouting(AdaptiveRouters(choices, 1, 8, StaticRouters(choices, 1, 8)), torch.tensor([0.5]), traced=True)
    surrogate = TokenSurrogate(choices, SurrogateSettings(threshold=0.25, lr=1e-2, weight_decay=0.0), 0, 100, False)
    counted = torch.rand(LENGTH, BATCH) < 0.8
    for step in range(100):
        routing.traces.clear()
        for number in (0, 1):
            final, full = torch.randn(LENGTH, BATCH, channels), 3 + torch.randn(BATCH, LENGTH)
            levels = torch.randint(0, 4, (choices.count, LENGTH, BATCH))
            above = (3 - levels[1]) * (final[..., 0] > 0)
            surrogate.watch(0, number, full, final)
            surrogate.watch(1, number, full + above.T, final)
            for block in range(choices.count):
                routing.traces.append(Trace(block, number, final, levels[block], counted))
        figures = surrogate.learn(step, [routing], 1.0)
        assert figures["routers_follow_surrogate"] is (figures["surrogate_error"] < 0.25)
        if not figures["routers_follow_surrogate"]:
            assert not surrogate.values(0, routing.traces[1]).any()
    assert figures["routers_follow_surrogate"]
    trace = routing.traces[-1]  # block 1 in micro-batch 1
    values = surrogate.values(0, trace)
    assert (values[~counted] == 0).all()
    gain = values[..., 0] - values[..., 3]
    care = final[..., 0] > 0
    clear = counted & (final[..., 0].abs() > 0.5)
    torch.testing.assert_close(gain[clear & care].mean(), torch.tensor(3.0), atol=0.5, rtol=0)
    torch.testing.assert_close(gain[clear & ~care].mean(), torch.tensor(0.0), atol=0.5, rtol=0)
    other = surrogate.values(0, routing.traces[-2])  # block 0, which does not matter
    assert (other[..., 0] - other[..., 3])[counted].abs().mean() < 0.3
