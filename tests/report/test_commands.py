"""Commands that the report advises: each is accepted by the command line, and follows the last stage."""

from __future__ import annotations

import shlex

import pytest

from flextron_mcore.report.commands import next_commands
from flextron_mcore.report.reader import collect
from flextron_mcore.settings.compose import compose
from tests.report import synthetic
from tests.report.synthetic import ELASTIC, EVALUATE

CUT = ["select", "generate", "export"]


def advised(run, *kinds: str) -> dict[str, list[str]]:
    """{stage: keys} of the commands after these stages."""
    for kind in kinds:
        metrics = synthetic.routing(kind)[0] if kind in ("router", "joint") else {**ELASTIC, "stage": kind}
        synthetic.write(run / f"my {kind}", metrics)
    found = {}
    for _, line in next_commands(collect(run)):
        program, stage, *keys = shlex.split(line)
        compose(stage, keys)
        assert program == "flextron"
        found[stage] = keys
    return found


@pytest.mark.parametrize(
    ("kinds", "stages"),
    [
        (["evaluate"], []),
        (["prepare", "pretrain"], ["importance"]),
        (["import", "importance"], ["elastic"]),
        (["elastic"], [*CUT, "evaluate", "router"]),
        (["elastic", "evaluate", "router"], [*CUT, "compare"]),
        (["elastic", "evaluate", "router", "compare", "joint"], CUT),
    ],
)
def test_advice_is_accepted_and_follows_the_last_stage(tmp_path, kinds, stages):
    assert list(advised(tmp_path, *kinds)) == stages


def test_advice_names_the_directories_of_the_run_and_a_budget_of_its_routers(tmp_path):
    keys = advised(tmp_path, "prepare", "router")
    assert keys["compare"] == [f"checkpoint={tmp_path}/my router", f"data={tmp_path}/my prepare", f"out={tmp_path}/compare"]
    assert keys["select"] == [f"checkpoint={tmp_path}/my router", "budget=0.8"]


def test_routers_that_choose_for_every_token_take_other_commands(tmp_path):
    metrics = synthetic.routing()[0]
    synthetic.write(tmp_path / "adaptive", {**metrics, "routers": {**metrics["routers"], "kind": "adaptive"}})
    synthetic.write(tmp_path / "evaluate", EVALUATE)
    assert next_commands(collect(tmp_path)) == []
