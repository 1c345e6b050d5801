"""Run train_elastic.py of this directory on one CPU process, for tests: `python on_cpu.py HF SORTED DATA STEPS OUT [LOAD]`.

HF is a Hugging Face directory; SORTED and DATA are outputs of `flextron importance` and `flextron prepare`. With LOAD, the OUT of
an earlier run, the run continues from iteration 3 of that one. Empty stand-ins replace Transformer Engine, which needs CUDA, and
NVIDIA's in-process restart, which is not used; gloo replaces nccl. The model is computed in fp32 without fused kernels. Model
provider, data, optimizer, loop and checkpoints are Bridge's own.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

from flextron_mcore.runtime import cpu

WITHOUT_KERNELS = dict.fromkeys(
    ("bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion",
     "persist_layer_norm", "apply_rope_fusion", "cross_entropy_loss_fusion", "bf16"), False
)  # fmt: skip
IN_FP32 = dict(params_dtype=torch.float32, pipeline_dtype=torch.float32, use_cpu_initialization=True, **WITHOUT_KERNELS)


class _AnyName(type):
    """Metaclass that answers every attribute with the class itself, which is enough for annotations and base classes."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return cls


class Unavailable(torch.nn.Module, metaclass=_AnyName):
    """Stand-in for every name that is imported from an absent package."""


def _stand_in(name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
    module.__dict__.update(attributes)
    sys.modules[name] = module


def enable() -> None:
    """Let Bridge be imported and run on the CPU. Call before it is imported."""
    cpu.enable()  # imports Megatron-Core, which must not find the stand-ins
    _stand_in("transformer_engine", __version__="0")
    _stand_in("transformer_engine.pytorch", __getattr__=partial(getattr, Unavailable))
    _stand_in("nvidia_resiliency_ext", __version__="0")
    _stand_in("nvidia_resiliency_ext.inprocess", CallWrapper=Unavailable)
    from megatron.bridge.training import initialize, setup
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    # Bridge compiles C++ helpers of the datasets at every start. The wheel lacks their sources: it has them compiled.
    initialize.compile_helpers = lambda: None

    def initialize_megatron(cfg: Any, **kwargs: Any) -> Any:
        groups = initialize.initialize_megatron(cfg, **kwargs, allow_no_cuda=True)
        model_parallel_cuda_manual_seed(cfg.rng.seed)  # Bridge does this only if there is a GPU
        return groups

    setup.initialize_megatron = initialize_megatron


def main(model: str, checkpoint: str, data: str, steps: int, out: str, load: str | None = None) -> None:
    enable()
    import train_elastic as example

    def pretrain(config: Any, step: Any) -> None:
        for name, value in IN_FP32.items():
            setattr(config.model, name, value)
        config.mixed_precision = None
        config.dist.distributed_backend = "gloo"
        config.train.global_batch_size, config.dataset.num_workers = 8, 0
        config.optimizer.lr, config.optimizer.min_lr, config.scheduler.lr_warmup_iters = 5e-4, 5e-5, 2
        config.checkpoint.save_interval = 3
        if load:
            config.checkpoint.load, config.checkpoint.ckpt_step = load, 3
        original(config, step)

    original, example.pretrain = example.pretrain, pretrain
    example.main(model, checkpoint, data, steps, out)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), *sys.argv[5:])
