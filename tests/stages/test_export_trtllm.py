"""`flextron export format=trtllm`, and latency tables from benchmarks of such exports."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.space import ElasticSpace, count_parameters
from tests import toy
from tests.stages.conftest import stage


def checkpoint(folder: Path, **changes) -> tuple[CheckpointInfo, str]:
    arch = toy.config(**changes)
    info = CheckpointInfo(arch, ElasticSpace.build(arch, 1, "kv_group", [2, 4], [16, 48]), sorted=True)
    info = replace(info, path=toy.write(toy.model(arch, info.space), info, folder))
    return info, f"checkpoint={folder}"


@pytest.mark.parametrize(
    "changes, options, architecture",
    [
        (toy.LLAMA, ["trtllm.style=deci", "trtllm.tensor_parallel_size=2"], "DeciLMForCausalLM"),
        (toy.LLAMA, ["trtllm.pipeline_parallel_size=2", "dtype=bf16"], "LlamaForCausalLM"),
        (toy.GPT2 | {"activation": "gelu"}, ["trtllm.tensor_parallel_size=4"], "GPTForCausalLM"),
    ],
)
def test_the_export_is_verified_and_counted(changes, options, architecture, tmp_path):
    info, key = checkpoint(tmp_path / "run", **changes)
    net = toy.random_network(info.model, info.space, 3)
    assert not net.is_uniform
    (tmp_path / "net.json").write_text(net.to_json())
    figures = stage("export", key, "format=trtllm", f"subnetwork={tmp_path}/net.json", f"out={tmp_path}/out", *options)
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert written == figures and figures["architecture"] == architecture
    assert figures["parameters"] == count_parameters(info.model, net) < figures["padded_parameters"]
    assert figures["max_logit_difference"] < (1e-5 if changes == toy.LLAMA and "dtype=bf16" not in options else 0.25)
    assert ("note" in figures) == (architecture == "GPTForCausalLM")


def test_a_tensor_parallel_size_that_does_not_fit_writes_nothing(tmp_path):
    _, key = checkpoint(tmp_path / "run", num_attention_heads=6, num_query_groups=6, kv_channels=6)
    with pytest.raises(FlextronError, match=r"trtllm.tensor_parallel_size=4: layers\[0\] has 6 query heads"):
        stage("export", key, "format=trtllm", "trtllm.tensor_parallel_size=4", f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_benchmarks_become_a_latency_table(tmp_path):
    """Benchmarked networks with additive latencies give a table of the terms."""
    info, key = checkpoint(tmp_path / "run")
    folders = []
    for i, widths in enumerate(((4, 48), (2, 48), (4, 16), (2, 16))):
        (tmp_path / f"{i}.json").write_text(info.space.uniform(info.model, *widths).to_json())
        folders.append(tmp_path / "exports" / str(i))
        stage("export", key, "format=trtllm", f"subnetwork={tmp_path}/{i}.json", f"out={folders[-1]}", "verify=false")
        milliseconds = 10 + 2 * (widths[0] == 4) * 0.5 + 2 * (widths[1] == 48) * 1.5  # the sum over two layers
        (folders[-1] / "bench.json").write_text(json.dumps({"performance": {"avg_request_latency_ms": milliseconds}}))
    out = tmp_path / "measured.json"
    command = [sys.executable, "-m", "flextron_mcore.latency.trtllm_bench", str(out), *map(str, folders)]
    subprocess.run(command, check=True)
    stage("latency", key, f"measurements={out}", f"out={tmp_path}/latency")
    table = json.loads((tmp_path / "latency" / "latency.json").read_text())
    assert table["constant"]["median_ms"] == pytest.approx(10)
    assert [row["median_ms"] for row in table["attention"]] == pytest.approx([0, 0.5])
    assert [row["median_ms"] for row in table["mlp"]] == pytest.approx([0, 1.5])
    (folders[1] / "bench.json").write_text('{"performance": {}}')
    (folders[2] / "bench.json").unlink()
    for last, words in ((2, "bench.json: is damaged, or of another program (lacks"), (3, "2/bench.json: no such file")):
        failed = subprocess.run([*command[:4], *map(str, folders[last - 1 : last])], capture_output=True, text=True)
        assert failed.returncode == 1 and words in failed.stderr and "Traceback" not in failed.stderr
