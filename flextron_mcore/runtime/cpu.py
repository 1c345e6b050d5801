"""Patches of torch and Megatron-Core that let Megatron-Core run without CUDA. With CUDA, nothing is patched.

Megatron-Core hard-codes the device "cuda". `enable()` makes that name mean the CPU in this process: in device arguments of tensor
factories and `.to`, in `Tensor.cuda`, in the CUDA random state and streams, and in the type strings that Megatron-Core's
optimizers compare. Collectives use gloo, and Adam is runtime/adam.py. No patch changes a computed number. No other file of the
package patches torch or Megatron-Core.
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
    """Stand-in for a CUDA stream whose methods do nothing, because work on a CPU runs in order."""

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
    """Stand-in for a CUDA event, which is always complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


def import_megatron() -> None:
    """Import Megatron-Core with torch.compile disabled, which halves the time of the import. Does nothing with CUDA.

    Megatron-Core passes its fused functions to torch.compile at import. A run on a CPU calls none of these functions. With CUDA,
    or if Megatron-Core is imported already, a later import statement does what it always does.
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
    """Patch torch and Megatron-Core to run on the CPU. Call before creating any Megatron-Core object.

    Has no effect with CUDA, and when called again.
    """
    global _enabled
    if _enabled or torch.cuda.is_available():
        return
    _enabled = True
    import_megatron()
    _patch_cuda_namespace()
    # torch collects its tensor factories at the first use of a device context. This use comes before they are wrapped.
    with torch.device("meta"):
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    _patch_tensor()
    _patch_random_state()
    _patch_optimizer()


@contextlib.contextmanager
def shared_groups() -> Iterator[None]:
    """Create only one gloo group for all groups of equal ranks that Megatron-Core creates within the block.

    Gloo runs three threads for each group, and one of them wakes a hundred times a second: the two dozen groups of one layout
    take 2 % of a core in an idle process. One group is enough, because all ranks issue their collectives in the same order. The
    default group is not shared, because Megatron-Core destroys some of its groups before it creates others. Has no effect with
    CUDA.
    """
    from megatron.core import parallel_state

    original = parallel_state.create_group
    made: dict[tuple[int, ...], Any] = {}
    if torch.cuda.is_available():
        yield
        return

    @functools.wraps(original)
    def create_group(ranks: list[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        key = tuple(sorted(ranks or range(torch.distributed.get_world_size())))
        if key not in made:
            made[key] = original(ranks, *args, **kwargs)
        return made[key]

    parallel_state.create_group = create_group
    try:
        yield
    finally:
        parallel_state.create_group = original


def _is_cuda(device: Any) -> bool:
    """True for a device argument, of any type, that names a CUDA device."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tensor factory such as torch.empty, so that the device "cuda" means the CPU."""

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
        """Tracker of named random states, like Megatron-Core's CudaRNGStatesTracker, for torch's default CPU generator."""

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
