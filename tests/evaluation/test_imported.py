"""`flextron import verify=true`: the checkpoint is compared with transformers, as a whole or layer by layer."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flextron_mcore.config import FlextronError
from flextron_mcore.evaluation.imported import compare_with_transformers
from tests import hf_toy
from tests.stages.conftest import stage

MODELS = {
    "llama": lambda: hf_toy.llama(),
    "llama, tied, scaled": lambda: hf_toy.llama(tie_word_embeddings=True, rope_scaling=hf_toy.LLAMA3, rope_theta=500.0),
    "llama, longrope": lambda: hf_toy.llama(rope_scaling=hf_toy.longrope(4, 8), rope_theta=500.0),
    "gpt2": lambda: hf_toy.gpt2(),
}


@pytest.fixture(params=MODELS)
def imported(request, tmp_path):
    source = hf_toy.save(MODELS[request.param](), tmp_path / "hf")
    return source, hf_toy.checkpoint(source, tmp_path / "run")


@pytest.mark.parametrize("layerwise", [False, True], ids=["whole", "layer by layer"])
def test_a_right_import(imported, layerwise):
    source, info = imported
    found = compare_with_transformers(info, source, layerwise=layerwise)
    assert set(found) == {"max_logit_difference", "max_layer_difference"} if layerwise else {"max_logit_difference"}
    assert max(found.values()) < 1e-5


@pytest.mark.parametrize("layerwise", [False, True], ids=["whole", "layer by layer"])
@pytest.mark.parametrize(
    "part, words",
    [
        ("embed_tokens", "embeddings"),
        ("layers.1.mlp.down_proj", "layer 1"),
        ("layers.0.self_attn.k_proj", "layer 0"),
        ("model.norm", "output layer"),
        ("lm_head", "output layer"),
    ],
)
def test_an_import_that_is_wrong(tmp_path, layerwise, part, words):
    """A wrong import is found: here the directory is changed after the import, so that transformers computes something else."""
    source = hf_toy.save(hf_toy.llama(), tmp_path / "hf")
    info = hf_toy.checkpoint(source, tmp_path / "run")
    tensors = load_file(source / "model.safetensors")
    (name,) = [name for name in tensors if part in name]
    tensors[name] *= 1.01
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(FlextronError, match=words if layerwise else "logits") as caught:
        compare_with_transformers(info, source, layerwise=layerwise)
    assert "of the imported model differ by" in str(caught.value) and "\n" not in str(caught.value)


KEYS = {"rope_theta": 500.0, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "original_max_position_embeddings": 9}


@pytest.mark.parametrize("layerwise", [False, True], ids=["whole", "layer by layer"])
@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_was_read_wrong(tmp_path, layerwise, key):
    source = hf_toy.save(hf_toy.llama(rope_scaling=hf_toy.longrope(4, 8)), tmp_path / "hf")
    info = hf_toy.checkpoint(source, tmp_path / "run")
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"][key] = KEYS[key]
    (source / "config.json").write_text(json.dumps(config))
    word = "is 8, and transformers reads 9" if key.startswith("original") else "differ by"
    with pytest.raises(FlextronError, match=f"of the imported model {word}"):
        compare_with_transformers(info, source, layerwise=layerwise)


def test_the_command(tmp_path, capsys):
    """The command says that config.json ties an output layer stored with other values, and compares bf16 with one fp32 tensor."""
    source = hf_toy.save(hf_toy.llama().bfloat16(), tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float() + 1e-4 * torch.arange(48)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    metrics = stage("import", f"hf={source}", f"out={tmp_path}/out", "verify=true")
    assert metrics["dtype"] == "bf16" and metrics["max_logit_difference"] < 1e-4
    said = " ".join(capsys.readouterr().out.split())
    assert "another one is stored: the model is imported untied, as transformers loads it" in said
    assert "1 tensor(s) stored with more digits become bf16: model.norm.weight: set dtype=fp32 to keep them" in said
    assert "compared with transformers on random tokens" in said


def test_refusals(tmp_path, monkeypatch):
    source = hf_toy.save(hf_toy.llama(), tmp_path / "hf")
    info = hf_toy.checkpoint(source, tmp_path / "run")
    (source / "config.json").write_text("{}")
    with pytest.raises(FlextronError, match="verify=true: transformers cannot load .*leave verify=true out"):
        compare_with_transformers(info, source)
    monkeypatch.setattr("flextron_mcore.evaluation.imported._USABLE", 0.0)
    with pytest.raises(FlextronError, match="verify=true: needs 0.0 GiB of memory, and 0.0 GiB can be used: leave"):
        compare_with_transformers(info, source)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FlextronError, match="verify=true: compares in one process, not in 2: start one, or leave"):
        stage("import", f"hf={source}", f"out={tmp_path}/out", "verify=true")
