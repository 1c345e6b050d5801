"""`export compensate=true` as a command: losses before and after, the card, and networks that have nothing to compensate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import open_data, valid_datasets
from flextron_mcore.exports import compensation
from flextron_mcore.space import SubNetwork
from tests.stages.conftest import stage

BATCHES, SIZE = 2, 4


@pytest.fixture(scope="module")
def half(chain, tmp_path_factory) -> Path:
    """File of the sub-network with half the heads and neurons of every layer."""
    info = open_checkpoint(chain / "elastic")
    file = tmp_path_factory.mktemp("half") / "half.json"
    heads, neurons = info.model.num_attention_heads // 2, info.model.ffn_hidden_size // 2
    file.write_text(info.space.uniform(info.model, heads, neurons).to_json())
    return file


def keys(chain: Path, half: Path | None) -> list[str]:
    given = [f"checkpoint={chain}/elastic", f"data={chain}/data", "compensate=true", "samples=24"]
    given += [f"model.micro_batch_size={SIZE}", f"limit_val_batches={BATCHES}"]
    return given + ([f"subnetwork={half}"] if half else [])


@torch.no_grad()
def transformers_loss(folder: Path, data: Path, cache: Path) -> float:
    """Loss that transformers computes from an exported directory, mean over domains."""
    model, losses = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    for dataset in valid_datasets(open_data(data), 32, 1234, cache).values():
        total = tokens = 0.0
        for i in range(min(BATCHES * SIZE, len(dataset))):
            sample = {name: torch.as_tensor(value) for name, value in dataset[i].items()}
            loss = cross_entropy(model(sample["tokens"][None]).logits[0], sample["labels"], reduction="none")
            total, tokens = total + (loss * sample["loss_mask"]).sum().item(), tokens + sample["loss_mask"].sum().item()
        losses.append(total / tokens)
    return sum(losses) / len(losses)


def test_export_compensates_and_says_by_how_much(chain, half, tmp_path, capsys):
    figures = stage("export", *keys(chain, half), f"out={tmp_path}/out")
    printed = capsys.readouterr().out
    plain = stage("export", f"checkpoint={chain}/elastic", f"subnetwork={half}", f"out={tmp_path}/plain")
    found = figures["compensation"]
    assert (found["samples"], found["tokens"], found["projections"]) == (24, 24 * 32, 4)
    assert figures["max_logit_difference"] < 1e-4 and figures["parameters"] == plain["parameters"]
    assert "compensation" not in plain and set(found["loss"]) == {"full", "cut", "compensated"}
    assert found["loss"]["cut"] == pytest.approx(transformers_loss(tmp_path / "plain", chain / "data", tmp_path / "c"), abs=1e-5)
    after = transformers_loss(tmp_path / "out", chain / "data", tmp_path / "c")
    assert found["loss"]["compensated"] == pytest.approx(after, abs=1e-5) != found["loss"]["cut"]
    said = f"4 projections refitted by least squares on 768 tokens; held-out loss {found['loss']['cut']:.3f} before"
    assert f"export: {said}" in printed and "compensation on 4 x 32 tokens a forward pass in fp32; about" in printed
    assert f"| compensated | {said}" in (tmp_path / "out" / "README.md").read_text()
    assert "compensated" not in (tmp_path / "plain" / "README.md").read_text()
    assert not (tmp_path / "out" / "cache").exists()
    assert ("compensation does not lower the loss" in printed) == (found["loss"]["compensated"] >= found["loss"]["cut"])


def test_a_difference_from_the_compensated_network_is_refused(chain, half, tmp_path, monkeypatch):
    """Weights that change between refit and file are found by the comparison of logits, and nothing stays."""
    refit = compensation.refit

    def damaged(*arguments):
        tensors, tokens = refit(*arguments)
        held = compensation.install
        monkeypatch.setattr(
            "flextron_mcore.runs.compensation.install", lambda m, n, t: held(m, n, {k: v * 2 for k, v in t.items()})
        )
        return tensors, tokens

    monkeypatch.setattr("flextron_mcore.runs.compensation.refit", damaged)
    with pytest.raises(FlextronError, match="export: logits differ by"):
        stage("export", *keys(chain, half), f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_does_not_fall_is_said(chain, half, tmp_path, monkeypatch, capsys):
    refit = compensation.refit

    def wrong(*arguments):
        tensors, tokens = refit(*arguments)
        return {name: torch.zeros_like(tensor) + 1 for name, tensor in tensors.items()}, tokens

    monkeypatch.setattr("flextron_mcore.runs.compensation.refit", wrong)
    stage("export", *keys(chain, half), "verify=false", f"out={tmp_path}/out")
    assert "compensation does not lower the loss: raise samples, or leave compensate=true out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, message",
    [
        (["format=trtllm", "trtllm.tensor_parallel_size=3"], "does not divide"),
        (["format=trtllm", "trtllm.pipeline_parallel_size=9"], "is more than the"),
        (["format=gguf", "gguf.type=q8_0", "dtype=fp16"], "give only one of them"),
    ],
)
def test_a_format_that_cannot_hold_the_network_is_refused_before_calibration(chain, half, tmp_path, monkeypatch, given, message):
    monkeypatch.setattr("flextron_mcore.stages.export.compensate", None)
    with pytest.raises(FlextronError, match=message):
        stage("export", *keys(chain, half), *given, f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_the_full_model_has_nothing_to_compensate(chain, tmp_path, capsys):
    figures = stage("export", *keys(chain, None), "verify=false", f"out={tmp_path}/out")
    assert "this network has all heads and neurons in its layers: nothing to compensate" in capsys.readouterr().out
    assert "compensation" not in figures


def test_a_family_is_compensated(chain, tmp_path, capsys):
    """`family` gives the loss of the slice and of the refitted export, on the same text."""
    given = [
        f"checkpoint={chain}/elastic",
        f"data={chain}/data",
        "selector=uniform",
        "limit_val_batches=1",
        "model.seq_length=16",
        "budgets=[0.6parameters,1.0parameters]",
    ]
    metrics = stage("family", *given, "compensate=true", "samples=8", "verify=false", f"out={tmp_path}/family")
    row, full = metrics["networks"]
    exported = json.loads((tmp_path / "family" / row["exports"]["hf"] / "metrics.json").read_text())
    assert (exported["compensation"]["samples"], exported["compensation"]["tokens"]) == (8, 8 * 16)
    found = exported["compensation"]["loss"]
    assert (row["loss"], row["compensated"]) == (pytest.approx(found["cut"], abs=1e-5), found["compensated"])
    assert full["compensated"] == full["loss"] == pytest.approx(found["full"], abs=1e-5)
    assert "loss, compensated" in " ".join(capsys.readouterr().out.split())
    assert "Mean loss, compensated" in (tmp_path / "family" / "report" / "index.html").read_text()
    assert SubNetwork.from_file(tmp_path / "family" / "networks" / f"{row['budget']}.json").to_dict() == exported["subnetwork"]
