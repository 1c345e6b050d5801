"""Megatron-Core without CUDA. The only file that patches anything; it does nothing where CUDA is present.

Megatron-Core names the device "cuda" in many places that are not configurable. `enable()` makes those names mean the CPU, for
this process: device arguments of tensor factories and `.to`, `Tensor.cuda`, the CUDA random state and streams, and the type
strings that its optimizers compare. Collectives run on gloo. Adam is runtime/adam.py, with the state layout of the fused one on a
GPU. Nothing here changes a number that is computed.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor", "zeros", "ones", "empty", "full", "arange", "rand", "randn", "randint",
    "empty_like", "zeros_like", "ones_like",
)  # fmt: skip
_enabled = False


class _Stream:
    """A stream of a device that has none: everything is already in order."""

    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, *args: Any) -> _Event:
        return _Event()

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *args: Any) -> bool:
        return False


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


def import_megatron() -> None:
    """Import Megatron-Core, without CUDA in half the time.

    It hands its fused functions to torch.compile, which loads all of torch's compiler; a run on the CPU calls none of them.
    """
    if torch.cuda.is_available() or "megatron.core" in sys.modules:
        return
    compile_ = torch.compile
    torch.compile = lambda model=None, **options: model if model is not None else lambda function: function
    try:
        importlib.import_module("megatron.core")
    finally:
        torch.compile = compile_


def enable() -> None:
    """Make Megatron-Core run on the CPU. No effect with CUDA or when called again. Call before building anything from it."""
    global _enabled
    if _enabled or torch.cuda.is_available():
        return
    _enabled = True
    import_megatron()
    _patch_cuda_namespace()
    with torch.device("meta"):  # torch lists its factories at the first use of a device context; it must not list the wrappers
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _patch_tensor()
    _patch_random_state()
    _patch_optimizer()


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)  # pinning needs CUDA
        return factory(*args, **kwargs)

    return wrapper


def _patch_cuda_namespace() -> None:
    cuda = torch.cuda
    cuda.current_device = lambda: _CPU
    for name in ("synchronize", "set_device", "set_stream", "empty_cache", "reset_peak_memory_stats", "manual_seed"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.memory_stats = lambda *args, **kwargs: {}
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _patch_tensor() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self

    original_to = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return original_to(self, *args, **kwargs)

    torch.Tensor.to = to

    original_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        # Megatron-Core's optimizers sort parameters by comparing this string with 'torch.cuda.FloatTensor' and the like.
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("megatron.core.optimizer"):
                return "torch.cuda." + result.removeprefix("torch.")
        return result

    torch.Tensor.type = type_


def _patch_random_state() -> None:
    from megatron.core.tensor_parallel import random as mcore_random

    class CpuRNGStatesTracker(mcore_random.CudaRNGStatesTracker):
        """Megatron-Core's tracker of random states, on the default CPU generator."""

        def __init__(self, use_cudagraphable_rng: bool = False, is_inference_rng_tracker: bool = False) -> None:
            super().__init__(False, is_inference_rng_tracker)

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise RuntimeError(f"random state {name} (seed {seed}) already exists")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = mcore_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise RuntimeError(f"random state {name} was not added")
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    mcore_random.CudaRNGStatesTracker = CpuRNGStatesTracker
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    mcore_random._CUDA_RNG_STATE_TRACKER = None
    mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False


def _patch_optimizer() -> None:
    import megatron.core.optimizer as mcore_optimizer
    from megatron.core.optimizer import distrib_optimizer

    from flextron_mcore.runtime.adam import FusedAdam

    if mcore_optimizer.USING_PYTORCH_OPTIMIZER:
        mcore_optimizer.Adam = distrib_optimizer.Adam = FusedAdam
        mcore_optimizer.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
