"""`flextron import` and `flextron export` on directories that transformers wrote, and reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    dynamic_module_utils,
)

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.space import SubNetwork, count_parameters
from tests import toy
from tests.stages.conftest import stage


@pytest.fixture(scope="module")
def llama(tmp_path_factory, chain) -> Path:
    """Directory of a random Llama with grouped queries and the chain's tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        head_dim=8, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(chain / "data" / "tokenizer").save_pretrained(folder)
    return folder


def same_logits(a: Path, b: Path) -> None:
    load = lambda path: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()  # noqa: E731
    tokens, _ = toy.inputs(vocab=300)
    with torch.no_grad():
        torch.testing.assert_close(load(a)(tokens).logits, load(b)(tokens).logits, atol=1e-5, rtol=0)


def test_llama_there_and_back(llama, tmp_path):
    metrics = stage("import", f"hf={llama}", f"out={tmp_path}/imported")
    assert metrics["parameters"] == sum(p.numel() for p in LlamaForCausalLM.from_pretrained(llama).parameters())
    info = open_checkpoint(tmp_path / "imported")
    assert info.space.attention_unit == "kv_group" and info.tokenizer.is_dir()
    figures = stage("export", f"checkpoint={tmp_path}/imported", f"out={tmp_path}/back", "verify=true")
    assert figures["architecture"] == "LlamaForCausalLM" and figures["max_logit_difference"] < 1e-5
    same_logits(llama, tmp_path / "back")


@pytest.mark.parametrize("uniform", [True, False])
def test_the_trained_chain_exports(chain, tmp_path, uniform):
    info = open_checkpoint(chain / "elastic")
    net = info.space.uniform(info.model, 2, 32) if uniform else toy.random_network(info.model, info.space, 3)
    (tmp_path / "net.json").write_text(net.to_json())
    figures = stage(
        "export", f"checkpoint={chain}/elastic", f"subnetwork={tmp_path}/net.json", f"out={tmp_path}/out", "verify=true"
    )
    assert figures["parameters"] == count_parameters(info.model, net) and figures["max_logit_difference"] < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert sum(p.numel() for p in model.parameters()) == figures["parameters"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    prompt = tokenizer("def main(", return_tensors="pt")
    greedy = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(
        model.generate(**prompt, **greedy, use_cache=True), model.generate(**prompt, **greedy, use_cache=False)
    )  # fmt: skip
    # An export of a stock class is a Hugging Face checkpoint like any other, so it can be imported again.
    if figures["architecture"] == "LlamaForCausalLM":
        stage("import", f"hf={tmp_path}/out", f"out={tmp_path}/again", "space.heads=[1.0]")
        assert count_parameters(open_checkpoint(tmp_path / "again").model) == figures["parameters"]


def test_an_export_leaves_nothing_elsewhere_and_names_no_place(chain, tmp_path, monkeypatch):
    """Verifying leaves no copy of the directory's code in the user's cache of transformers, and metrics.json holds no path."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    modules, path = set(sys.modules), list(sys.path)
    info = open_checkpoint(chain / "elastic")
    (tmp_path / "net.json").write_text(toy.random_network(info.model, info.space, 3).to_json())
    for name, keys in (("hf", [f"subnetwork={tmp_path}/net.json"]), ("hf_elastic", [])):
        stage("export", f"checkpoint={chain}/elastic", f"format={name}", f"out={tmp_path}/{name}", *keys)
        assert (tmp_path / name / "config.json").read_text().count("auto_map") == 1
        metrics = (tmp_path / name / "metrics.json").read_text()
        assert str(tmp_path) not in metrics and str(chain) not in metrics
    assert not cache.exists() and sys.path == path
    assert not [name for name in set(sys.modules) - modules if name.startswith("transformers_modules")]


def test_evaluating_one_subnetwork(chain, tmp_path):
    info = open_checkpoint(chain / "elastic")
    net = toy.random_network(info.model, info.space, 4)
    (tmp_path / "net.json").write_text(net.to_json())
    keys = [f"checkpoint={chain}/elastic", f"data={chain}/data", f"subnetwork={tmp_path}/net.json"]
    first, second = (stage("evaluate", *keys, f"out={tmp_path}/{name}") for name in ("a", "b"))
    assert first["networks"] == second["networks"]  # evaluation is deterministic
    written = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert written["loss"].keys() == {"code", "prose"} == written["perplexity"].keys()
    assert written["networks"][0]["subnetwork"] == net.to_dict() and written["networks"][0]["name"] == "net"
    with pytest.raises(FlextronError, match="a: exists already"):
        stage("evaluate", *keys, f"out={tmp_path}/a")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "net.json").write_text(toy.random_network(info.model, info.space, 5).to_json())
    files = [f"{tmp_path}/net.json", f"{tmp_path}/other/net.json"]
    both = stage("evaluate", *keys[:2], f"subnetwork=[{','.join(files)}]", f"out={tmp_path}/both")
    assert [row["name"] for row in both["networks"]] == files


def test_a_network_of_another_space_is_refused(chain, tmp_path):
    (tmp_path / "other.json").write_text(SubNetwork.full(toy.config(ffn_hidden_size=40)).to_json())
    for name, more in (("export", []), ("evaluate", [f"data={chain}/data"])):
        with pytest.raises(FlextronError, match=r"other.json: layers\[0\].ffn_hidden_size 40 is not a candidate"):
            stage(name, f"checkpoint={chain}/elastic", f"subnetwork={tmp_path}/other.json", f"out={tmp_path}/out", *more)
    assert not (tmp_path / "out").exists()


def test_gpt2_import(tmp_path):
    torch.manual_seed(6)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    stage("import", f"hf={tmp_path}/hf", f"out={tmp_path}/imported")
    stage("export", f"checkpoint={tmp_path}/imported", f"out={tmp_path}/back", "verify=true")
    same_logits(tmp_path / "hf", tmp_path / "back")


def test_import_with_a_space_that_does_not_fit_writes_nothing(llama, tmp_path):
    with pytest.raises(FlextronError, match="space.ffn_hidden_size: 0.3 x 64 = 19.2 is not a multiple of 2"):
        stage(
            "import",
            f"hf={llama}",
            "space.ffn_hidden_size=[0.3]",
            "space.granularity=2",
            "space.heads=[0.5]",
            f"out={tmp_path}/out",
        )
    with pytest.raises(FlextronError, match="nowhere"):
        stage("import", f"hf={tmp_path}/nowhere", f"out={tmp_path}/out")
    assert list(tmp_path.iterdir()) == []


def test_report_of_the_chain(chain, tmp_path):
    stage("evaluate", f"checkpoint={chain}/elastic", f"data={chain}/data", f"out={tmp_path}/run/evaluate")
    stage("report", f"run={tmp_path}/run", f"out={tmp_path}/report")
    family = json.loads((tmp_path / "report" / "family.json").read_text())["family"]
    assert len(family) == 4 and (tmp_path / "report" / "index.html").stat().st_size > 10_000
