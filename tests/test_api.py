"""The public API: every name is documented with an example that runs, and importing the package stays light."""

import doctest
import os
import subprocess
import sys

import pytest

import flextron_mcore
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.runtime import watch
from flextron_mcore.space import ElasticSpace, SubNetwork
from tests import toy


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    arch = toy.config()
    space = ElasticSpace.build(arch)
    info = CheckpointInfo(arch, space)
    return toy.write(toy.model(arch, space), info, tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("name", sorted(set(flextron_mcore.__all__) - {"FlextronError"}))
def test_example_of_every_name(name, checkpoint, tmp_path):
    names = {each: getattr(flextron_mcore, each) for each in flextron_mcore.__all__}
    (found,) = doctest.DocTestFinder(recurse=False).find(
        names[name], name, globs={**names, "checkpoint": checkpoint, "folder": tmp_path}
    )
    assert found.examples, f"{name} has no example"
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found).failed == 0


def test_names_are_those_of_dir():
    assert set(flextron_mcore.__all__) <= set(dir(flextron_mcore))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flextron_mcore.nothing  # noqa: B018


def test_import_is_light():
    code = "import sys, flextron_mcore as f; f.ModelConfig, f.SubNetwork; assert not {'torch', 'megatron'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_program_runs_on_a_cpu_and_prints_nothing_of_its_own():
    code = """
from flextron_mcore import ElasticSpace, ModelConfig, build_model
import torch
torch.zeros(1, device="cuda")  # the CPU runtime came before Megatron-Core's modules
from flextron_mcore import initialize
initialize(seed=1)
arch = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=67, max_position_embeddings=24)
build_model(arch, ElasticSpace.build(arch))
"""
    # Without the variables of torchrun, which say that this process is a rank already.
    environment = {name: value for name, value in os.environ.items() if name not in watch.LAUNCH}
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and "Unknown MLP type" not in found.stdout + found.stderr, found.stderr


def test_initialize_names_the_layout_that_does_not_fit():
    with pytest.raises(FlextronError, match="1 process.* cannot hold model.tensor_model_parallel_size=2"):
        flextron_mcore.initialize(tensor_model_parallel_size=2)


def test_export_refuses_what_is_there(checkpoint, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(FlextronError, match="exists already and was not written by flextron"):
        flextron_mcore.export(checkpoint, tmp_path)
    for format in ("hf", "gguf", "trtllm", "megatron"):
        with pytest.raises(FlextronError, match="sub-network"):
            flextron_mcore.export(checkpoint, tmp_path / "new", SubNetwork(7, ()), format)
    with pytest.raises(FlextronError, match="holds every sub-network"):
        flextron_mcore.export(
            checkpoint, tmp_path / "new", flextron_mcore.select(checkpoint, "0.6 parameters", "uniform"), "hf_elastic"
        )
    with pytest.raises(FlextronError, match="format"):
        flextron_mcore.export(checkpoint, tmp_path / "new", format="pickle")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_every_network_in_one_directory(checkpoint, tmp_path):
    assert flextron_mcore.export(checkpoint, tmp_path / "all", format="hf_elastic")["format"] == "hf_elastic"
