"""`flextron latency`: tables that are measured here or fitted to measurements made elsewhere, and refusals."""

from __future__ import annotations

import json

import pytest

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.latency.table import LatencyTable
from flextron_mcore.space import SubNetwork
from tests import toy
from tests.stages.conftest import stage

FEW = ["rounds=1", "check_networks=2", "setting.prompt_length=8"]


@pytest.mark.parametrize("kind", [[], ["setting.kind=generation", "setting.generated_tokens=3", "setting.batch_size=1"]])
def test_a_table_is_measured(chain, tmp_path, kind):
    metrics = stage("latency", f"checkpoint={chain}/elastic", *FEW, *kind, f"out={tmp_path}/out")
    info = open_checkpoint(chain / "elastic")
    table = LatencyTable.from_file(tmp_path / "out" / "latency.json", info.model, info.space)
    assert table.setting["prompt_length"] == 8 and table.setting["generated_tokens"] == (3 if kind else 1)
    assert metrics["full_model_ms"] == table.cost().full > 0 and metrics["check"]["networks"] == 2


def test_measurements_made_elsewhere_are_fitted(chain, tmp_path):
    info = open_checkpoint(chain / "elastic")
    networks = [SubNetwork.full(info.model), *(toy.random_network(info.model, info.space, seed) for seed in range(30))]
    seconds = [
        5 + sum(2 * layer.num_attention_heads + 0.25 * layer.ffn_hidden_size for layer in net.layers) for net in networks
    ]  # fmt: skip
    (tmp_path / "net0.json").write_text(networks[0].to_json())
    rows = [{"subnetwork": net.to_dict(), "ms": value} for net, value in zip(networks, seconds, strict=True)]
    rows[0]["subnetwork"] = "net0.json"
    (tmp_path / "measured.json").write_text(json.dumps(rows))
    keys = [f"checkpoint={chain}/elastic", f"measurements={tmp_path}/measured.json"]
    metrics = stage("latency", *keys, f"out={tmp_path}/out")
    assert metrics["full_model_ms"] == pytest.approx(seconds[0]) and metrics["check"]["largest_error"] < 1e-9
    assert metrics["warning"] is None
    for change, message in (
        ({"ms": -1}, r"measured.json: \[0\].ms=-1 is not a latency"),
        ({"ms": "fast"}, "measured.json: is not a list of"),
        ({"subnetwork": "gone.json"}, "gone.json: "),
        ({"subnetwork": {**networks[1].to_dict(), "hidden_size": 7}}, r"\[0\].subnetwork: hidden_size 7 is not a candidate"),
    ):
        (tmp_path / "measured.json").write_text(json.dumps([{**rows[0], **change}, *rows[1:]]))
        with pytest.raises(FlextronError, match=message):
            stage("latency", *keys, f"out={tmp_path}/other")
        assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "keys, message",
    [
        (["setting.kind=decode"], "setting.kind='decode' is not known: use one of prefill, generation"),
        (["setting.prompt_length=33"], "33 tokens of prompt and 1 generated do not fit the model's 32 positions"),
        (["setting.kind=generation"], "16 tokens of prompt and 64 generated do not fit"),
        (["rounds=0"], "rounds=0 must be at least 1"),
    ],
)
def test_bad_workloads_and_measurements_are_refused(chain, tmp_path, keys, message):
    with pytest.raises(FlextronError, match=message):
        stage("latency", f"checkpoint={chain}/elastic", *keys, f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()
