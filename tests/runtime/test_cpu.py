"""The CPU runtime: device names mean the CPU, random streams are kept apart, nothing that is computed changes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from megatron.core import tensor_parallel

from flextron_mcore.runtime import cpu
from flextron_mcore.runtime.watch import LAUNCH

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU runtime does nothing where CUDA is present")


def test_cuda_names_the_cpu():
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.ones(1).to("cuda").cuda().device.type == "cpu"
    assert torch.empty(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.zeros(3, device="meta").device.type == "meta"
    with torch.device("meta"):
        assert torch.ones(2).device.type == "meta"


def test_megatron_is_imported_without_the_compiler_which_is_there_afterwards():
    code = """
import sys
from flextron_mcore.runtime import cpu
from flextron_mcore.runtime.watch import LAUNCH
cpu.import_megatron()
assert "megatron.core" in sys.modules and "torch._inductor.compile_fx" not in sys.modules
import torch
assert torch.compile.__module__ == "torch"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_enabling_again_changes_nothing():
    before = torch.zeros, torch.Tensor.to
    cpu.enable()
    assert before == (torch.zeros, torch.Tensor.to)


def test_type_strings_are_cuda_for_megatrons_optimizers_only():
    assert torch.zeros(1).type() == "torch.FloatTensor"
    caller = {"__name__": "megatron.core.optimizer.optimizer", "torch": torch}
    assert eval("torch.zeros(1).type()", caller) == "torch.cuda.FloatTensor"


def test_random_streams_are_kept_apart():
    tracker = tensor_parallel.get_cuda_rng_tracker()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with tracker.fork():
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with tracker.fork():
        assert not torch.equal(torch.rand(3), first)
    with pytest.raises(RuntimeError, match="random state other was not added"), tracker.fork("other"):
        pass


ALONE = """
import os, torch
from flextron_mcore.runtime import distributed
from megatron.core import parallel_state
for _ in range(2):  # once more after an end
    distributed.initialize()
    groups = [parallel_state.get_tensor_model_parallel_group(), parallel_state.get_pipeline_model_parallel_group(),
              parallel_state.get_data_parallel_group(), parallel_state.get_data_parallel_group_gloo(),
              parallel_state.get_model_parallel_group(), parallel_state.get_embedding_group()]
    values = torch.arange(3.0)
    for group in groups:
        torch.distributed.all_reduce(values, group=group)
        torch.distributed.reduce_scatter_tensor(values.clone(), values, group=group)
    assert values.tolist() == [0, 1, 2] and {group.size() for group in groups} == {1}
    print(len(os.listdir("/proc/self/task")))
    distributed.shutdown()
"""


def test_a_process_alone_has_few_threads():
    """Groups of a single process share one gloo group: two dozen would hold 65 threads, which wake 1,900 times a second."""
    env = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    found = subprocess.run([sys.executable, "-c", ALONE], env=env | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert max(map(int, found.stdout.split())) <= 12
