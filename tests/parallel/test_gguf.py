"""format=gguf from two ranks: the main process writes, and the file is verified."""

from __future__ import annotations

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.space import ElasticSpace, count_parameters
from tests import toy
from tests.parallel.worker import run_jobs


def test_two_ranks_write_one_verified_file(tmp_path):
    arch = toy.config(num_attention_heads=8, num_query_groups=4)
    space = ElasticSpace.build(arch, granularity=2, heads=[0.5, 1.0])
    toy.write(toy.model(arch, space), CheckpointInfo(arch, space), tmp_path / "run")
    net = toy.random_network(arch, space, 3)
    (tmp_path / "net.json").write_text(net.to_json())
    keys = [f"checkpoint={tmp_path}/run", f"subnetwork={tmp_path}/net.json", "format=gguf", "model.tensor_model_parallel_size=2"]
    jobs = [
        {"stage": "export", "keys": [*keys, f"out={tmp_path}/good"], "layout": "tp2"},
        {"stage": "export", "keys": [*keys, f"out={tmp_path}/bad", "gguf.type=q3"], "layout": "tp2"},
    ]
    (tmp_path / "jobs").mkdir()
    good, bad = run_jobs(2, jobs, tmp_path / "jobs")
    for rank in good:
        assert rank["result"]["parameters"] == count_parameters(arch, net) and rank["result"]["max_logit_difference"] < 1e-5
    assert all("gguf.type='q3' is not known" in rank["error"] for rank in bad)
    assert {"README.md", "model.gguf"} <= {file.name for file in (tmp_path / "good").iterdir()}
    assert not (tmp_path / "bad").exists()
