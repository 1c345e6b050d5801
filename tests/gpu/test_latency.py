"""Measured latencies are the GPU's: work that the host queues counts for the block that queued it."""

from __future__ import annotations

import time

import pytest
import torch

from flextron_mcore.latency.measure import Setting, device_name, measure, time_networks
from flextron_mcore.space import ElasticSpace
from tests import toy

PAUSE = 30.0  # ms; each block of the toy model takes less than 1 ms


@pytest.fixture(scope="module")
def pause():
    """Function that keeps the device busy for at least PAUSE ms. With CUDA the work is queued and the host goes on."""
    if not torch.cuda.is_available():
        return lambda: time.sleep(PAUSE / 1000)
    cycles, milliseconds = 1_000_000, 0.0
    while milliseconds < PAUSE:
        cycles *= 2
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize()
        milliseconds = start.elapsed_time(end)
    return lambda: torch.cuda._sleep(2 * cycles)  # GPU clocks vary


@pytest.mark.parametrize("setting", [Setting("prefill", 2, 16), Setting("generation", 1, 5, 3)], ids=["prefill", "generation"])
def test_the_table_has_the_devices_time(pause, setting, device):
    arch = toy.config()
    space = ElasticSpace.build(arch)
    model = toy.model(arch, space)
    slowed = lambda mlp, *_: pause() if mlp.used(mlp.state.widths) == 24 else None  # noqa: E731
    slow = [layer.mlp.register_forward_hook(slowed) for layer in model.decoder.layers]
    table = measure(model, arch, space, setting, 2, 0, seed=1)
    passes = setting.generated_tokens
    timings = table.timings[arch.hidden_size]
    times = dict(zip(space.ffn_hidden_size, (timing.minimum for timing in timings.candidates["ffn_hidden_size"]), strict=True))
    # Half of PAUSE: the correction for drift is inexact with small blocks on a busy machine.
    assert times.pop(24) >= passes * PAUSE / 2
    others = [*times.values(), timings.constant.minimum, *(timing.minimum for timing in timings.candidates["heads"])]
    assert 0 < min(others) and max(others) < passes * PAUSE / 2
    half, full = time_networks(model, arch, [space.uniform(arch, 2, 24), None], setting, rounds=1, seed=1)
    assert half.minimum >= passes * PAUSE > full.minimum
    for handle in slow:
        handle.remove()
    assert table.machine["device"] == device_name()
    if device.type == "cuda":
        assert table.machine["device"] == torch.cuda.get_device_name() and table.machine["threads"] is None
