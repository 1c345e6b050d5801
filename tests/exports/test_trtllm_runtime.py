"""flextron_trtllm on a stand-in for TensorRT-LLM's API: it loads the `hf` export as it is, with the same logits."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import flextron_mcore.exports.trtllm as package
from flextron_mcore.exports.formats import Job, get_format
from tests import hf_toy
from tests.exports import trtllm_stub
from tests.exports.test_hf import GROUPS, QUERIES, networks

RUNTIME = Path(package.__file__).parent / "runtime"
CASES = {
    "groups": ({}, GROUPS),
    "query heads": ({}, QUERIES),
    "tied": (dict(tie_word_embeddings=True), QUERIES),
    "biases": (dict(attention_bias=True, mlp_bias=True), GROUPS),
    "llama3": (dict(rope_scaling=hf_toy.LLAMA3, rope_theta=500.0), GROUPS),
}


@pytest.fixture(params=["up to 1.3", "1.4"])
def runtime(request, monkeypatch):
    """The flextron_trtllm package, imported as TensorRT-LLM's --custom_module_dirs does."""
    trtllm_stub.install(monkeypatch, moved=request.param == "1.4")
    monkeypatch.syspath_prepend(str(RUNTIME))
    importlib.import_module("flextron_trtllm")
    yield
    for name in [name for name in sys.modules if name.startswith("flextron_trtllm")]:
        del sys.modules[name]


def exported(out: Path, options: dict, space: dict):
    """Export a network whose layers differ to `out` with format=hf, and return the network."""
    source = hf_toy.save(hf_toy.llama(**options), out.with_name("hf"))
    info = hf_toy.checkpoint(source, out.with_name("run"), space)
    net = networks(info)["by layer"]
    out.mkdir()
    get_format("hf").write(Job(info, net, out))
    return net


@pytest.mark.parametrize("case", CASES)
def test_the_hf_export_loads_with_true_widths(case, runtime, tmp_path):
    out = tmp_path / "out"
    net = exported(out, *CASES[case])
    config = AutoConfig.from_pretrained(out, trust_remote_code=True)
    assert config.architectures == ["FlextronLlamaForCausalLM"]
    mapping = SimpleNamespace(tp_size=1, enable_attention_dp=False)
    model = trtllm_stub.MODELS[config.architectures[0]](SimpleNamespace(pretrained_config=config, mapping=mapping))
    model.load_weights(load_file(out / "model.safetensors"), trtllm_stub.MAPPERS["HF", config.architectures[0]]())
    kv_heads = [layer.kv_groups for layer in net.layers]
    assert vars(config)["num_key_value_heads"] == kv_heads  # TensorRT-LLM sizes the KV cache by it
    assert [len(layer.mlp.down_proj.weight.T) for layer in model.model.layers] == [n.ffn_hidden_size for n in net.layers]
    theirs = hf_toy.load(out)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    metadata = SimpleNamespace(kv_cache={})
    for tokens, expected in zip(hf_toy.tokens(), hf_toy.logits(theirs), strict=True):
        with torch.no_grad():
            found = model(metadata, tokens, torch.arange(len(tokens))[None])
        torch.testing.assert_close(found, expected, atol=hf_toy.ATOL, rtol=0)
    assert metadata.kv_cache == dict(enumerate(kv_heads))


def test_kv_heads_are_copied_where_there_are_fewer_than_ranks(runtime):
    """Whole KV heads are copied to the ranks, by the layer's own number of heads; biases, too."""
    mapper = trtllm_stub.MAPPERS["HF", "FlextronLlamaForCausalLM"]()
    mapper.model, mapper._tp_size = SimpleNamespace(config=SimpleNamespace(head_dim=3)), 4
    weight, bias = torch.arange(12.0).view(6, 2), torch.arange(6.0)
    copied = mapper._duplicate_kv_weights(None, "k_proj", {"weight": weight, "bias": bias})
    a, b = weight.chunk(2)
    assert torch.equal(copied["weight"], torch.cat([a, a, b, b]))
    assert copied["bias"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    enough = torch.arange(24.0).view(12, 2)
    assert torch.equal(mapper._duplicate_kv_weights(None, "v_proj", {"weight": enough})["weight"], enough)
    assert mapper._duplicate_kv_weights(None, "q_proj", {"weight": weight})["weight"] is weight


def test_the_runtime_package_is_independent(tmp_path):
    """flextron_trtllm does not import flextron_mcore, and pip builds a wheel of it."""
    imported = set()
    for file in (RUNTIME / "flextron_trtllm").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
            if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
                imported |= {name.split(".")[0] for name in names}
    assert imported == {"tensorrt_llm", "torch"}
    source = tmp_path / "source"
    shutil.copytree(RUNTIME, source, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("flextron_trtllm-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if not re.search(r"dist-info/", name)} == {
        "flextron_trtllm/__init__.py",
        "flextron_trtllm/modeling_flextron_llama.py",
    }
