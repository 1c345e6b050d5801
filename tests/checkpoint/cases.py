"""Models whose checkpoints the tests of this folder write."""

from __future__ import annotations

from pathlib import Path

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.runtime.disk import write_aside
from flextron_mcore.space import ElasticSpace
from tests import toy

CASES = {
    "llama": (toy.LLAMA, 4, "kv_group", 2),
    "gpt2": (toy.GPT2, 4, "kv_group", 4),
    "query heads": (toy.LLAMA, 2, "query_head", 4),
}


def case(name):
    kind, groups, unit, granularity = CASES[name]
    arch = toy.config(**kind, num_query_groups=groups)
    space = ElasticSpace.build(arch, granularity, unit, heads=[1.0], modulation=name == "gpt2")
    return arch, space, toy.model(arch, space)


def stream(model, info: CheckpointInfo, run: Path) -> CheckpointInfo:
    with write_aside(run) as aside:
        toy.write(model, info, aside)
    return open_checkpoint(run)
