"""Measure memory on the CPU: bytes that a training run holds, and the peak of allocations during a call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """{address: bytes} of the storages of the tensors; views share one."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}


def peak(run: Callable[[], object]) -> int | None:
    """Peak of the bytes that `run` allocates, above those allocated before; None if it cannot be measured.

    oneDNN is off meanwhile: on CPUs with AMX, its products in bf16 allocate buffers, on others they do not. The peak cannot be
    measured with gloo, which frees send buffers in a thread that the profiler does not see.
    """
    from torch.profiler import ProfilerActivity, profile

    with torch.backends.mkldnn.flags(enabled=False), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    now = most = 0
    for *_, size in changes:
        now += size
        most = max(most, now)
    return most if now < 0.05 * most else None


class Kept:
    """Context that counts the bytes of tensors that autograd keeps for backward passes.

    Args:
        given: tensors that do not count, such as parameters.

    Attributes:
        now: bytes that are kept now.
        most: largest value of `now` so far.
    """

    def __init__(self, given: Iterable[torch.Tensor]) -> None:
        self.given, self.counts, self.now, self.most = storages(given), Counter(), 0, 0

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: _Saved(self, tensor), lambda saved: saved.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


class _Saved:
    """Tensor in an autograd graph, which counts in `kept` as long as the graph holds it."""

    def __init__(self, kept: Kept, tensor: torch.Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        ((self.key, self.size),) = storages([tensor]).items() or ((0, 0),)
        if self.key in kept.given:
            self.size = 0
        if not kept.counts[self.key]:
            kept.now += self.size
            kept.most = max(kept.most, kept.now)
        kept.counts[self.key] += 1

    def __del__(self) -> None:
        self.kept.counts[self.key] -= 1
        if not self.kept.counts[self.key]:
            self.kept.now -= self.size


def training(arch: dict[str, Any], data: str, out: str, keys: list[str]) -> dict[str, Any]:
    """Bytes that this rank holds in a run of `pretrain`: {weights, gradients, optimizer, activations, kept}.

    activations: peak of a step above weights, gradients and optimizer. kept: its part that autograd keeps for the backward pass.

    Args:
        arch: architecture, as ModelConfig.to_dict gives it.
        data: out of `prepare`.
        out: directory for the run's files.
        keys: further keys of `pretrain`.
    """
    from flextron_mcore.checkpoint.store import CheckpointInfo
    from flextron_mcore.config import ModelConfig
    from flextron_mcore.data.blend import open_data
    from flextron_mcore.runtime import distributed
    from flextron_mcore.settings.compose import compose
    from flextron_mcore.space import ElasticSpace
    from flextron_mcore.training.checks import check
    from flextron_mcore.training.log import Log
    from flextron_mcore.training.loop import Phase, _Run

    config = compose("pretrain", [f"data={data}", f"out={out}", *keys])
    distributed.initialize(config.model, config.seed)
    model, prepared = ModelConfig.from_dict(arch), open_data(data)
    info = CheckpointInfo(model, ElasticSpace.build(model, granularity=2), dtype=config.trainer.precision)
    length = check(config, info, prepared)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    run = _Run(config, folder, info, prepared, Phase(lambda step: [None], lambda step: {}), length)
    for chunk in run.model:
        chunk.train()
    log = Log(folder, 0, config)
    run._step(0, log)
    parameters = [p for chunk in run.model for p in chunk.parameters()]
    weights = storages(parameters)
    gradients = storages(p.main_grad for p in parameters)
    inner = [o.optimizer for o in getattr(run.trained.optimizer, "chained_optimizers", [run.trained.optimizer])]
    held = [t for o in inner for state in o.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    held += [p for o in inner for group in o.param_groups for p in group["params"]]
    optimizer = {k: v for k, v in storages(held).items() if k not in weights and k not in gradients}
    found = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    sizes = {name: sum(values.values()) for name, values in found.items()}
    sizes["activations"] = peak(lambda: run._step(1, log))
    with Kept(parameters) as kept:
        run._step(2, log)
    sizes["kept"] = kept.most
    log.close()
    return sizes
