"""FLOPs of real steps against torch's counter, and the figures of a step on a CPU and on known and unknown GPUs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flextron_mcore.config import ModelConfig
from flextron_mcore.flops import Costs, step_flops
from flextron_mcore.layers.block import new_gates
from flextron_mcore.model import build_model
from flextron_mcore.pipeline.networks import run_networks
from flextron_mcore.settings.devices import peak_tflops
from flextron_mcore.space import ElasticSpace
from flextron_mcore.training.sampler import draw
from flextron_mcore.training.speed import Meter
from tests import toy
from tests.launch.test_estimate import FAMILIES, LENGTH, weighted_network

BATCH, MICRO_BATCHES = 2, 2


class EveryPair(Costs):
    """Costs in which a query sees all tokens: torch's plain attention kernel also computes the pairs that are masked."""

    @property
    def _keys(self) -> list[float]:
        return [self.length] * self.model.num_layers


def counted(arch: ModelConfig, space: ElasticSpace, nets: list, frozen: bool, backward: bool, gates: bool) -> int:
    """FLOPs of a step as torch counts them."""
    model = build_model(arch, space).train().requires_grad_(not frozen)

    def batches():
        for seed in range(MICRO_BATCHES):
            tokens, positions = toy.inputs(BATCH, seed, arch.vocab_size, LENGTH)
            mask = torch.ones(BATCH, LENGTH)
            yield {"tokens": tokens, "labels": tokens.clone(), "position_ids": positions.contiguous(), "loss_mask": mask}

    given = [None, *new_gates(len(nets) - 1, 2 * arch.num_layers, torch.device("cpu"))] if gates else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_networks([model], batches, MICRO_BATCHES, nets, LENGTH, BATCH, forward_only=not backward, gates=given)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "ministral"])
@pytest.mark.parametrize("kind", ["elastic", "weighted", "joint", "router", "router without surrogate"])
def test_a_step_has_the_operations_that_torch_counts(family, kind):
    arch = FAMILIES[family]
    axes = {} if kind == "weighted" else {"hidden_size": (0.5, 1.0), "depth": (0.5, 0.75, 1.0)}
    space = ElasticSpace.build(arch, **axes)
    nets = [None, *draw(arch, space, seed=0, step=3, count=3)]
    shown = list(nets)
    if kind == "weighted":
        nets[1], shown[1] = weighted_network(arch), None
    frozen, gates = kind.startswith("router"), kind in ("joint", "router without surrogate")
    found = counted(arch, space, nets, frozen, kind != "router", gates)
    counts = LENGTH * BATCH * MICRO_BATCHES * step_flops(EveryPair(arch, space, LENGTH), shown, frozen, gates)
    assert counts == pytest.approx(found, rel=1e-6)
    assert LENGTH * BATCH * MICRO_BATCHES * step_flops(Costs(arch, space, LENGTH), shown, frozen, gates) < found


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        *((name, None) for name in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA A10", "Tesla V100")),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_recipe(name, peak):
    assert peak_tflops(name) == peak


def test_mfu_is_of_gpus_whose_peak_is_known(monkeypatch):
    arch, gb = FAMILIES["llama"], 3 * 10**9
    info = SimpleNamespace(model=arch, space=ElasticSpace.build(arch), dtype="fp32")
    settings = SimpleNamespace(
        stage="elastic",
        trainer=SimpleNamespace(precision="bf16"),
        model=SimpleNamespace(tensor_model_parallel_size=1),
    )
    meter = Meter(settings, info, LENGTH, frozen=False, gates=False)
    on_cpu = meter.figures([None], samples=8, seconds=0.5)
    flops = 3 * 8 * LENGTH * Costs(arch, info.space, LENGTH).full
    assert on_cpu["tflops_per_sec_per_gpu"] == pytest.approx(flops / 0.5 / 1e12)
    assert "mfu" not in on_cpu and not meter.note and 0.05 < on_cpu["memory_gb"] < 100
    assert "tflops_per_sec_per_gpu" not in meter.figures([None, object()], samples=8, seconds=0.5)  # token routing
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: gb)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    known = Meter(settings, info, LENGTH, frozen=False, gates=False)
    found = known.figures([None], samples=8, seconds=0.5)
    assert found["mfu"] == pytest.approx(flops / 0.5 / 989e12) and found["memory_gb"] == 3 and not known.note
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    unknown = Meter(settings, info, LENGTH, frozen=False, gates=False)
    assert unknown.note == "elastic: no MFU in the log: the peak throughput of NVIDIA L4 is not in conf/gpu"
    assert "mfu" not in unknown.figures([None], samples=8, seconds=0.5)
