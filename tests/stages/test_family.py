"""`flextron family`: a network for every budget, evaluated, exported and reported."""

from __future__ import annotations

import json

import pytest
from transformers import AutoModelForCausalLM

from flextron_mcore.config import FlextronError
from flextron_mcore.space import SubNetwork
from flextron_mcore.stages import export
from tests.stages.conftest import stage


def keys(chain, out, budgets='["0.6 parameters",["0.8 parameters","0.95 memory"]]'):
    given = [f"checkpoint={chain}/elastic", f"data={chain}/data", "selector=uniform", "limit_val_batches=1", f"out={out}"]
    return [*given, f"budgets={budgets}", "formats=[hf,megatron]"]


def test_a_family(chain, tmp_path, monkeypatch):
    out, run = tmp_path / "family", export.run

    def failing(config):
        if "0.8" in str(config.out):
            raise FlextronError("out of disk")
        return run(config)

    monkeypatch.setattr(export, "run", failing)
    with pytest.raises(FlextronError, match="out of disk"):
        stage("family", *keys(chain, out))
    monkeypatch.undo()
    first = (out / "0.6_parameters_hf" / "metrics.json").stat().st_mtime_ns
    metrics = stage("family", *keys(chain, out))
    assert (out / "0.6_parameters_hf" / "metrics.json").stat().st_mtime_ns == first  # the export is not written again
    small, large = metrics["networks"]
    assert (small["budget"], large["budget"]) == ("0.6_parameters", "0.8_parameters,0.95_memory")
    for row in (small, large):
        net = SubNetwork.from_file(out / "networks" / f"{row['budget']}.json")
        assert net.to_dict() == row["subnetwork"] and row["uniform"] and row["loss"] > 0
        model = AutoModelForCausalLM.from_pretrained(out / row["exports"]["hf"])
        assert model.num_parameters() == row["costs"]["parameters"]["value"]
        assert json.loads((out / row["exports"]["megatron"] / "metrics.json").read_text())["format"] == "megatron"
    assert small["costs"]["parameters"]["share"] <= 0.6 < large["costs"]["parameters"]["share"] <= 0.8
    assert "A model for every budget" in (out / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    "given, message",
    [
        (["budgets=[]"], "must be a list such as"),
        (["budgets=[0.9parameters,0.9parameters]"], "has one twice"),
        (["budgets=[1.2parameters]"], "is not within"),
        (["formats=[hf_elastic]"], "formats='hf_elastic' is not known: use one of hf, trtllm"),
        (["formats=[onnx]"], "onnx"),
        (["selector=random"], "selector='random' is not known: use one of router"),
    ],
)
def test_bad_input_writes_nothing(chain, tmp_path, given, message):
    with pytest.raises(FlextronError, match=message):
        stage("family", *keys(chain, tmp_path / "out"), *given)
    assert not (tmp_path / "out").exists()
