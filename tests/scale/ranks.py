"""Ranks of a large launch, built one after another on the meta device under torch's fake process group.

`python -m tests.scale.ranks JOB` reads a job (JSON: architecture, space, keys of `pretrain`, world size, ranks) and prints a JSON
list with the bytes and the stored tensors of each rank. Nothing is allocated: meta tensors have shapes alone.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FACTORIES = {getattr(torch, name) for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "rand", "randn", "linspace")}


class OnMeta(TorchFunctionMode):
    """Mode in which all factories of tensors make meta tensors, whatever device they name."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in FACTORIES:
            kwargs["device"] = "meta"
        result = function(*args, **kwargs)
        return result.replace("meta.", "") if isinstance(result, str) else result  # Megatron-Core compares Tensor.type()


@contextlib.contextmanager
def rank_of(world: int, rank: int, settings: Any) -> Iterator[None]:
    """Context in which this process is one rank of a large launch, in Megatron-Core's process groups.

    Args:
        world: number of ranks.
        rank: this rank.
        settings: section `model` of a stage, whose layout the groups have.
    """
    from megatron.core import parallel_state, tensor_parallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    create = parallel_state.create_group
    parallel_state.create_group = lambda *args, **options: create(*args, **{**options, "backend": "fake"})  # gloo would connect
    gather = torch.distributed.all_gather_object
    torch.distributed.all_gather_object = lambda found, value, group=None: found.__setitem__(slice(None), [value] * len(found))
    try:
        parallel_state.initialize_model_parallel(
            settings.tensor_model_parallel_size,
            settings.pipeline_model_parallel_size,
            settings.virtual_pipeline_model_parallel_size,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        yield
    finally:
        parallel_state.create_group, torch.distributed.all_gather_object = create, gather
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def measure(job: dict[str, Any], rank: int) -> dict[str, Any]:
    """Bytes of weights, gradients and optimizer state of a rank, and the pieces of tensors that it would store.

    pieces: [key, global shape, offset, shape, True if this rank writes it] each.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    from flextron_mcore.config import ModelConfig
    from flextron_mcore.model import build_chunks
    from flextron_mcore.settings.compose import compose
    from flextron_mcore.space import ElasticSpace
    from flextron_mcore.training import build

    config = compose("pretrain", ["data=d", "out=o", *job["keys"]])
    model = ModelConfig.from_dict(job["model"])
    with rank_of(job["world"], rank, config.model), OnMeta():
        precision = config.trainer.precision
        chunks = build_chunks(model, ElasticSpace.build(model, **job["space"]), config.model, precision, initialize=False)
        pieces = []
        for chunk in chunks:
            stored = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
            apply_factories(stored)
            for each in _tensors(stored, ShardedTensor):
                main = is_main_replica(each.replica_id)
                pieces.append([each.key, list(each.global_shape), list(each.global_offset), list(each.local_shape), main])
        wrapped = [build.Float16Module(chunk.config, chunk) if precision == "bf16" else chunk for chunk in chunks]
        wrapped = build._distributed(wrapped, config.model.ddp)
        optimizer = build._optimizer(wrapped, config.model, precision)
        found = {"rank": rank, "pieces": pieces}
        parameters = [p for chunk in wrapped for p in chunk.parameters()]
        found["weights"] = sum(p.numel() * p.element_size() for p in parameters)
        buffers = [b for chunk in wrapped for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        found["gradients"] = sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers)
        found["optimizer"] = _optimizer_bytes(optimizer, parameters)
    return found


def _optimizer_bytes(optimizer: Any, parameters: list[torch.nn.Parameter]) -> int:
    """Bytes of Adam's moments and of the main weights. Takes a step of Adam, which makes the moments."""
    held = {id(p) for p in parameters}
    total = 0
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = each.optimizer
        for group in inner.param_groups:
            for p in group["params"]:
                total += 0 if id(p) in held else p.numel() * p.element_size()
                p.grad = torch.empty_like(p)
        inner.step()
        for state in inner.state.values():
            total += sum(t.numel() * t.element_size() for t in state.values() if isinstance(t, torch.Tensor) and t.dim())
    return total


def _tensors(stored: Any, kind: type) -> Iterator[Any]:
    for each in stored.values() if isinstance(stored, dict) else stored if isinstance(stored, list) else [stored]:
        if isinstance(each, dict | list):
            yield from _tensors(each, kind)
        elif isinstance(each, kind):
            yield each


def main() -> None:
    from flextron_mcore.runtime import cpu

    cpu.enable()
    job = json.loads(sys.argv[1])
    print(json.dumps([measure(job, rank) for rank in job["ranks"]]))


if __name__ == "__main__":
    main()
