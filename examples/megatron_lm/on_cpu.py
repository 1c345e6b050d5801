"""Patches with which Megatron-LM's training loop runs on a CPU, for tests. Unpatched, it starts nccl and refuses to run there."""

from __future__ import annotations

from typing import Any

from megatron.training import arguments, get_args, training

from flextron_mcore.runtime import distributed
from flextron_mcore.settings.sections import LayoutSettings

_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")


def enable() -> None:
    """Make Megatron-LM run on the CPU, with gloo. Call it before arguments are parsed."""
    arguments.get_device_arch_version = lambda: 10  # below 10, Megatron-LM wants CUDA_DEVICE_MAX_CONNECTIONS=1
    initialize = training.initialize_megatron

    def initialize_megatron(**kwargs: Any) -> None:
        args = get_args()
        layout = LayoutSettings(**{name: getattr(args, name) for name in _LAYOUT})
        distributed.initialize(layout, args.seed)  # Megatron-LM uses the process groups that exist
        initialize(**kwargs, allow_no_cuda=True)

    training.initialize_megatron = initialize_megatron
