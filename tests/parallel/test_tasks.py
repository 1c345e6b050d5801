"""Scores of tasks do not depend on the parallel layout."""

from __future__ import annotations

import pytest

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.parallel.worker import run_jobs
from tests.stages.conftest import stage
from tests.tasks_toy import measured, write_tasks

TP2, PP2, VIRTUAL, SEQUENCE = (
    *("model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"),
    *("model.virtual_pipeline_model_parallel_size=2", "model.sequence_parallel=true"),
)
# Keys of layouts of two processes; none: data parallel 2. Only TP2 and DP2 generate with a KV cache.
LAYOUTS = [[TP2], [TP2, SEQUENCE], [PP2, VIRTUAL], []]


def test_scores_at_every_layout_are_those_of_one_process(tmp_path, tmp_path_factory, text):
    stage("prepare", f"input={text}/prose", "vocab_size=301", "valid_fraction=0.3", f"out={tmp_path}/data")
    size = dict(num_layers=4, vocab_size=301, num_query_groups=2, max_position_embeddings=32)  # ranks pad the odd vocabulary
    arch = toy.config(**size, share_embeddings_and_output_weights=True)
    space = ElasticSpace.build(arch, heads=[0.5, 1.0], ffn_hidden_size=[0.5, 1.0], hidden_size=[0.5, 1.0], granularity=2)
    toy.write(toy.model(arch, space), CheckpointInfo(arch, space), tmp_path / "model")
    (tmp_path / "small.json").write_text(space.uniform(arch, heads=2, ffn_hidden_size=24, hidden_size=16).to_json())
    (tmp_path / "tasks").mkdir()
    keys = [
        *(f"checkpoint={tmp_path}/model", f"data={tmp_path}/data", "limit_val_batches=1", "model.micro_batch_size=3"),
        *(f"subnetwork={tmp_path}/small.json", f"tasks_dir={write_tasks(tmp_path / 'tasks')}"),
        *("tasks=[heldout_continuation,write,roll]", "limit=7"),
    ]
    expected = measured(stage("evaluate", *keys, f"out={tmp_path}/one")["networks"][0])
    jobs = [
        {"stage": "evaluate", "keys": [*keys, *layout, f"out={tmp_path}/{i}"], "layout": str(layout[:1])}
        for i, layout in enumerate(LAYOUTS)
    ]
    for layout, ranks in zip(LAYOUTS, run_jobs(2, jobs, tmp_path_factory.mktemp("jobs")), strict=True):
        for rank in ranks:
            found = measured(rank["result"]["networks"][0])
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), layout
