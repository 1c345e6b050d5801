"""`export compensate=true` on two ranks in every layout: the weights of one process, and a verified directory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.space import SKIPPED, ElasticSpace, SubNetwork
from tests import toy
from tests.parallel.worker import run_jobs
from tests.stages.conftest import stage

LAYOUTS = {
    "data": [],
    "tensor": ["model.tensor_model_parallel_size=2"],
    "sequence": ["model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    "pipeline": ["model.pipeline_model_parallel_size=2"],
    "virtual": ["model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"],
}
MODELS = {"llama": (toy.LLAMA, "kv_group"), "biases": ({**toy.LLAMA, "bias": True}, "query_head")}


@pytest.fixture(scope="module")
def keys(tmp_path_factory, text) -> dict[str, list[str]]:
    """{model: keys of its export}. In the network with biases the second pipeline stage has no layer."""
    run, found = tmp_path_factory.mktemp("compensation"), {}
    stage("prepare", f"input=[{text}/code,{text}/prose]", "vocab_size=300", "valid_fraction=0.2", f"out={run}/data")
    for name, (kind, unit) in MODELS.items():
        arch = toy.config(**kind, num_layers=4, num_attention_heads=8, num_query_groups=4, vocab_size=301)
        space = ElasticSpace.build(arch, 2, unit, [0.5, 1.0], [0.25, 0.5, 1.0], hidden_size=[16, 32], depth=[2, 4])
        toy.write(toy.model(arch, space), CheckpointInfo(arch, space), run / name)
        small, wide = space.layer_choice(arch, 4, 24), space.layer_choice(arch, 8, 12)
        net = SubNetwork(32, (small, wide, wide, small)) if name == "llama" else SubNetwork(16, (small, wide, SKIPPED, SKIPPED))
        (run / f"{name}.json").write_text(net.to_json())
        given = [f"checkpoint={run}/{name}", f"subnetwork={run}/{name}.json", f"data={run}/data", "compensate=true"]
        found[name] = [*given, "samples=22", "model.micro_batch_size=2", "limit_val_batches=1"]
    return found


@pytest.fixture(scope="module")
def done(keys, tmp_path_factory) -> tuple[Path, dict[tuple[str, str], dict]]:
    """(directory of the exports LAYOUT/MODEL, {(layout, model): metrics}); `one` is the layout of one process."""
    root = tmp_path_factory.mktemp("exports")
    found = {("one", name): stage("export", *given, f"out={root}/one/{name}") for name, given in keys.items()}
    places = [(layout, name) for layout in LAYOUTS for name in keys]
    jobs = [
        {"stage": "export", "keys": [*keys[name], *LAYOUTS[layout], f"out={root}/{layout}/{name}"], "layout": layout}
        for layout, name in places
    ]
    for place, ranks in zip(places, run_jobs(2, jobs, tmp_path_factory.mktemp("jobs")), strict=True):
        assert not [rank["error"] for rank in ranks if "error" in rank], place
        found[place] = ranks[0]["result"]
    return root, found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_refit_the_weights_of_one_process(layout, name, done):
    root, figures = done
    one, many = (load_file(root / place / name / "model.safetensors") for place in ("one", layout))
    assert one.keys() == many.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(many[key], tensor, atol=2e-4, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
    first, second = figures["one", name], figures[layout, name]
    assert second["max_logit_difference"] < 1e-4 and second["compensation"]["tokens"] == first["compensation"]["tokens"]
    for which, loss in first["compensation"]["loss"].items():
        assert second["compensation"]["loss"][which] == pytest.approx(loss, abs=1e-4), which
