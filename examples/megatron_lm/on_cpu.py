"""Megatron-LM's loop without CUDA, for tests: it asks the GPU for its kind, starts nccl, and refuses a machine without a GPU."""

from __future__ import annotations

from typing import Any

from megatron.training import arguments, get_args, training

from flextron_mcore.runtime import distributed
from flextron_mcore.settings.sections import LayoutSettings

_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")


def enable() -> None:
    """Let Megatron-LM run on this process's CPU, over gloo. Call before the arguments are parsed."""
    arguments.get_device_arch_version = lambda: 10  # new enough to want no environment variables for CUDA
    initialize = training.initialize_megatron

    def initialize_megatron(**kwargs: Any) -> None:
        args = get_args()
        layout = LayoutSettings(**{name: getattr(args, name) for name in _LAYOUT})
        distributed.initialize(layout, args.seed)  # found and used by Megatron-LM
        initialize(**kwargs, allow_no_cuda=True)

    training.initialize_megatron = initialize_megatron
