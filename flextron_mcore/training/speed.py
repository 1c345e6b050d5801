"""Speed and memory of a training step: tokens and FLOPs a second, MFU, seconds, and peak memory."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choosing import Network
from flextron_mcore.flops import Costs, step_flops
from flextron_mcore.layers.weighted import WeightedNetwork
from flextron_mcore.settings.devices import peak_tflops
from flextron_mcore.settings.training import LoopSettings
from flextron_mcore.space import SubNetwork
from flextron_mcore.training.learner import Figures

# Figures that a clock or the machine decides, so that they differ between two runs of a training.
MEASURED = ("step_seconds", "tokens_per_second", "tflops_per_sec_per_gpu", "mfu", "memory_gb")


class Meter:
    """Figures of the speed of a training's steps, for the log.

    FLOPs are those of the model (flops.py): of all networks of a step, without recomputation.

    Args:
        settings: settings of the stage.
        info: architecture, space and precision of the model.
        seq_length: tokens of a sample.
        frozen: True if the weights get no gradients.
        gates: True if router gates (scalars on the outputs of blocks) get gradients.
        teacher: frozen teacher, whose forward pass counts in every step; None without.

    Attributes:
        note: line for the user if the peak of this GPU is not known, so that there is no MFU; else "".
    """

    def __init__(
        self,
        settings: LoopSettings,
        info: CheckpointInfo,
        seq_length: int,
        frozen: bool,
        gates: bool,
        teacher: CheckpointInfo | None = None,
    ) -> None:
        ranks = settings.model.tensor_model_parallel_size
        self.costs = Costs(info.model, info.space, seq_length, ranks)
        self.teaching = Costs(teacher.model, teacher.space, seq_length, ranks).full if teacher else 0.0
        self.frozen, self.gates, self.note = frozen, gates, ""
        self.peak: float | None = None
        if torch.cuda.is_available() and (settings.trainer.precision or info.dtype) == "bf16":
            name = torch.cuda.get_device_name()
            self.peak = peak_tflops(name)
            if self.peak is None:
                self.note = f"{settings.stage}: no MFU in the log: the peak throughput of {name} is not in conf/gpu"

    def figures(self, networks: Sequence[Network], samples: int, seconds: float) -> Figures:
        """Figures of a step: those of MEASURED that are known.

        `tflops_per_sec_per_gpu`, TFLOP/s of a rank, is missing with token routing, where every token has another network. `mfu`
        is its share of the GPU's bf16 peak. `memory_gb` (1e9 bytes) is of this process: on a GPU the most that was allocated so
        far, else its resident set.

        Args:
            networks: networks that the step ran, the full model (None) first.
            samples: global batch size.
            seconds: duration of the step.
        """
        tokens = samples * self.costs.length
        figures: Figures = {"step_seconds": seconds, "tokens_per_second": tokens / seconds}
        if all(isinstance(net, SubNetwork | WeightedNetwork | None) for net in networks):
            counted = [net if isinstance(net, SubNetwork) else None for net in networks]  # a weighted network computes all units
            flops = tokens * (step_flops(self.costs, counted, self.frozen, self.gates) + self.teaching)
            figures["tflops_per_sec_per_gpu"] = flops / (seconds * torch.distributed.get_world_size()) / 1e12
            if self.peak:
                figures["mfu"] = figures["tflops_per_sec_per_gpu"] / self.peak
        used = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else psutil.Process().memory_info().rss
        return {**figures, "memory_gb": used / 1e9}
