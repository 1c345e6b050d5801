"""Estimate of the time that a stage takes in a layout, to compare layouts of one model on the same GPUs. No torch import.

The time adds up: the operations of the slowest pipeline stage, or their launches from the host if these take longer; the
pipeline's bubble; and the messages between ranks, as if none overlapped with operations. It leaves out that small matrix products
reach fewer FLOP/s than large ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from flextron_mcore.flops import Costs
from flextron_mcore.launch.activations import networks
from flextron_mcore.launch.layout import LOOPED, TRAINED, Layout, Rank
from flextron_mcore.settings.launch import LaunchSettings
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.space import SubNetwork
from flextron_mcore.training.rampup import BatchSizes

# Seconds in which the host launches a layer's forward and backward pass: 100 operations of 20 microseconds (docs/results/gpu.md).
HOST = 100 * 20e-6
PEAK = 312.0  # TFLOP/s where cluster.gpu.peak_tflops is not set


@dataclass(frozen=True)
class Speed:
    """Speed of one GPU and of its links.

    Attributes:
        flops: FLOP/s that training reaches.
        node: bytes/s that a GPU sends to others of its node.
        network: bytes/s that a GPU sends to other nodes.
        devices: GPUs of a node that a job uses.
    """

    flops: float
    node: float
    network: float
    devices: int

    @classmethod
    def read(cls, settings: LaunchSettings, devices: int) -> Speed:
        """Speed of a launch's GPUs, from the keys of cluster.gpu and cluster.utilisation.

        Args:
            settings: settings of the launch.
            devices: GPUs of a node that a job uses.
        """
        gpu = settings.cluster.gpu
        peak = (gpu.peak_tflops or PEAK) * 1e12
        return cls(peak * settings.cluster.utilisation, gpu.node_bandwidth * 1e9, gpu.network_bandwidth * 1e9, devices)

    def link(self, ranks: int) -> float:
        """Bytes/s of messages within a group that spans `ranks` consecutive ranks: of the network if they exceed one node."""
        return self.node if ranks <= self.devices else self.network


def stage_seconds(costs: Costs, settings: StageSettings, layout: Layout, flops: float, speed: Speed) -> float:
    """Estimated seconds of a stage in a layout; of a stage without a training loop, of its operations only.

    Args:
        costs: FLOPs per token of the model's networks.
        settings: settings of the stage.
        layout: layout of the stage over ranks.
        flops: FLOPs of the stage, all ranks together, from `work` (flops.py).
        speed: speed of the GPUs.
    """
    model, stages = costs.model, layout.pipeline
    world = layout.tensor * stages * layout.data
    layer, head = costs.layer(SubNetwork.full(model).layers[0]), costs.head()
    of_stage = [layers * layer for layers in layout.layers]
    of_stage[-1] += head
    compute = flops / (world * speed.flops) * max(of_stage) * stages / sum(of_stage)
    if settings.stage not in LOOPED:
        return compute
    trained = settings.stage in TRAINED
    rank, layers, steps = Rank(model, layout, 0), max(layout.layers), settings.trainer.max_steps
    passes = BatchSizes(settings.model, steps).start(steps) / (layout.micro_batch * layout.data) * networks(settings)
    compute = max(compute, passes * layers * HOST * (1 if trained else 1 / 3))
    sent = rank.tokens * model.hidden_size * layout.dtype  # bytes of a micro-batch's hidden states
    reduced = 2 * (1 + trained) + {"mlp": 1, "": 0}.get(layout.recompute[0], 2) * trained  # all-reduces of a layer
    messages = layers * reduced * 2 * (1 - 1 / layout.tensor) * sent / speed.link(layout.tensor)
    if stages > 1:
        messages += (1 + trained) * layout.chunks * rank.stream / speed.link(world)
    bubble = (stages - 1) * steps / (layout.chunks * passes)
    total = (compute + passes * messages) * (1 + bubble)
    if trained and layout.data > 1:
        each = 4 + layout.dtype if settings.model.ddp.use_distributed_optimizer else 8  # bytes of a gradient and of a weight
        total += steps * each * rank.parameters * (1 - 1 / layout.data) / speed.link(layout.tensor * layout.data)
    return total
