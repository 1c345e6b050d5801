"""`flextron evaluate tasks=...`: scores of a network are those of its export under lm_eval's own model for transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.evaluation.heldout import KINDS
from flextron_mcore.runs import tasks as runs_tasks
from tests.stages.conftest import stage
from tests.tasks_toy import measured, write_tasks

LIMIT = 24


def transformers_scores(export: Path, names: list[str], *folders: Path) -> dict[str, float]:
    """Scores of an exported directory by lm_eval's own model for transformers, as tests.tasks_toy.measured gives them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from flextron_mcore.evaluation.harness import metrics_of

    found = lm_eval.simple_evaluate(
        model="hf",
        # No cache of logits: with it, lm_eval 0.4.13 scores wrong positions of requests with the same tokens whose continuations
        # begin at different places. Two rows of different tasks here are such requests.
        model_args=f"pretrained={export},dtype=float32,logits_cache=False",
        tasks=names,
        task_manager=TaskManager(include_path=[str(folder) for folder in folders], include_defaults=False),
        batch_size=4,
        device="cpu",
        limit=LIMIT,
        log_samples=False,
    )
    return measured({"tasks": {name: metrics_of(row) for name, row in found["results"].items()}})


def test_scores_are_those_of_the_export_under_transformers(chain, tmp_path):
    """Covers all kinds of requests, two budgets in one run, and task files that the run itself wrote."""
    names = [*KINDS, "write", "roll"]
    (tmp_path / "own").mkdir()
    own = write_tasks(tmp_path / "own")
    keys = [f"checkpoint={chain}/elastic", "selector=uniform"]
    found = stage(
        *("evaluate", *keys, f"data={chain}/data", "limit_val_batches=1", 'budgets=["1.0 parameters","0.7 parameters"]'),
        *(f"tasks=[{','.join(names)}]", f"tasks_dir={own}", f"limit={LIMIT}", f"out={tmp_path}/evaluated"),
    )
    full, small = found["networks"]
    assert full["parameters"] > small["parameters"] and full["loss"] != small["loss"]
    stage("export", *keys, 'budget="0.7 parameters"', "verify=false", f"out={tmp_path}/export")
    theirs = transformers_scores(tmp_path / "export", names, tmp_path / "evaluated" / "tasks", own)
    ours = measured(small)
    assert ours.keys() == theirs.keys() and len(ours) >= 14
    assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert sum(abs(measured(full)[key] - value) > 1e-3 * abs(value) for key, value in ours.items()) > 5
    shown = {key: f"{value:.4f}" for key, value in ours.items() if "perplexity" not in key}
    assert shown == {key: f"{value:.4f}" for key, value in theirs.items() if key in shown}
    rows = [json.loads(line) for line in (tmp_path / "evaluated/tasks/heldout_continuation.jsonl").read_text().splitlines()]
    assert len(rows) > 100 and {row["label"] for row in rows} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["limit=3"], "limit=3: has an effect with tasks= only"),
        (["tasks_trust_code=true"], "tasks_trust_code=True: has an effect with tasks= only"),
        (["budgets=[0.7]", "budget=0.5"], "budget= and budgets= are two ways to say which networks to evaluate"),
        (["tasks=[heldout_last_word]", "apply_chat_template=true"], "apply_chat_template=true: .* has no chat template"),
        (["tasks=[write]"], "tasks: write writes up to 40 tokens, which the model's 32 positions do not hold"),
        (["tasks=[choose]"], "a continuation has [0-9]+ tokens, which the model's 32 positions do not hold"),
    ],
)
def test_refused_settings(chain, tmp_path, keys, message):
    if keys[-1] in ("tasks=[write]", "tasks=[choose]"):
        (tmp_path / "own").mkdir()
        file = write_tasks(tmp_path / "own") / "write.yaml"
        changed = file.read_text().replace("max_gen_toks: 9", "max_gen_toks: 40")
        file.write_text(changed)
        roll = (tmp_path / "own" / "roll.yaml").read_text().replace("task: roll", "task: choose").split("output_type")[0]
        (tmp_path / "own" / "choose.yaml").write_text(roll + "output_type: loglikelihood\nmetric_list: [{metric: acc}]\n")
        keys = [*keys, f"tasks_dir={tmp_path}/own"]
    common = [f"checkpoint={chain}/sorted", f"data={chain}/data", "limit_val_batches=1"]
    with pytest.raises(FlextronError, match=message):
        stage("evaluate", *common, *keys, f"out={tmp_path}/out")
    assert not (tmp_path / "out").exists()


def test_without_lm_eval(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(runs_tasks, "find_spec", lambda name: None)
    with pytest.raises(FlextronError, match=r"tasks: need the Python package lm-eval: pip install 'flextron_mcore\[eval\]'"):
        stage("evaluate", f"checkpoint={chain}/sorted", f"data={chain}/data", "tasks=[heldout_last_word]", f"out={tmp_path}/out")
