"""Files that other versions of Python and Megatron-Core wrote are read, and files written here are complete for them."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from flextron_mcore.runtime import compat
from flextron_mcore.space import ElasticSpace
from tests import toy


def test_paths_of_python_3_13(monkeypatch):
    if sys.version_info < (3, 13):
        monkeypatch.delitem(sys.modules, "pathlib._local", raising=False)
    compat.know_paths()
    # what pickle.dumps(Path("a/b"), 0) returns in Python 3.13
    assert pickle.loads(b"cpathlib._local\nPosixPath\np0\n(Va/b\np1\ntp2\nRp3\n.") == Path("a/b")


def test_the_distributed_optimizer_saves_each_parameter_as_its_own():
    """Saved optimizer state does not depend on gradient buckets; bucket_size=1 makes many of them, most padded at their end."""
    arch = toy.config()
    gpt = toy.model(arch, ElasticSpace.build(arch, modulation=True))
    options = DistributedDataParallelConfig(use_distributed_optimizer=True, overlap_grad_reduce=True, bucket_size=1)
    model = DistributedDataParallel(gpt.config, options, gpt)
    compat.count_padding(model)
    settings = OptimizerConfig(optimizer="adam", lr=1e-3, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [model])
    for parameter in gpt.parameters():
        parameter.main_grad.zero_()
    optimizer.step()
    metadata = {"non_homogeneous_layers": True, "distrib_optim_sharding_type": "fully_reshardable"}
    weights = gpt.sharded_state_dict(metadata=dict(metadata))
    state = optimizer.sharded_state_dict({"model": weights}, is_loading=False, metadata=dict(metadata))
    saved = {value.key: value.data for value in nested_values(state) if ".state.param." in getattr(value, "key", "")}
    assert len(saved) == len(list(gpt.parameters()))
    for value in weights.values():
        if isinstance(value.data, torch.nn.Parameter):
            assert torch.equal(saved[f"optimizer.state.param.{value.key}"].view_as(value.data), value.data), value.key
