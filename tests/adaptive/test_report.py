"""Token routing in the report: metrics read, tables, alt texts of the figures."""

from __future__ import annotations

import pytest

from flextron_mcore.adaptive.report import TOPICS
from flextron_mcore.report import TOPICS as STATIC
from flextron_mcore.report import build_report, routing
from tests.report import synthetic
from tests.report.conftest import coarse  # noqa: F401

TRAINED, EVALUATED = TOPICS


def made(policies=("full", "own")) -> tuple[dict, list[dict]]:
    metrics, log = synthetic.routing(steps=6)
    del metrics["budgets"]
    budgets = []
    for target in (0.9, 0.7):
        outcomes = {}
        for i, policy in enumerate(policies):
            losses = {"easy": 2.0 + (1 - target) + 0.1 * i, "hard": 4.0 + 2 * (1 - target) + 0.1 * i}
            levels = {domain: [[0.5, 0.25, 0.25]] * 16 for domain in losses}
            shares = {"easy": target - 0.1, "hard": target + 0.1}
            mean = sum(losses.values()) / 2
            outcomes[policy] = {"loss": losses, "mean_loss": mean, "shares": shares, "share": target, "levels": levels}
        static = {"mean_loss": 3.5, "share": target - 0.01}
        budgets.append({"target": target, "static": static, "adaptive": outcomes})
    metrics["routers"] = {"kind": "adaptive", "costs": ["latency"], "kv_policy": policies[0]}
    metrics["adaptive_budgets"], metrics["full_loss"] = budgets, {"easy": 2.0, "hard": 4.0}
    metrics["token_costs"] = [{"domain": "easy", "budget": 0.9, "texts": ["def", " $f$", "\n"], "shares": [0.9, 0.8, 0.6]}]
    return metrics, log


def test_metrics_are_read(tmp_path):
    (found,) = synthetic.read(TRAINED, tmp_path, adaptive=made(), static=synthetic.routing(steps=1))
    assert [budget.target for budget in found.adaptive_budgets] == [0.7, 0.9]
    assert found.adaptive_budgets[0].adaptive["own"].loss["hard"] == pytest.approx(4.7)
    assert found.token_costs[0].texts[1] == " $f$"


def test_training_of_adaptive_routers_is_shown_beside_that_of_static_ones(tmp_path):
    found = synthetic.read(routing.TOPIC, tmp_path, adaptive=made(), static=synthetic.routing())
    assert [each.signal for each in found] == ["straight-through, a token", "surrogate"] and not found[0].budgets
    parts = [part.key for part in routing.sections(found)]
    assert parts == ["budgets", "routers"]  # no part `signals`: it compares two static routers, and there is one


@pytest.mark.parametrize("policies", [("full", "own"), ("own",), ("full",)])
def test_tables_and_figures_of_the_section(tmp_path, policies):
    (part,) = TRAINED.sections(synthetic.read(TRAINED, tmp_path, adaptive=made(policies)))
    assert part.key == "adaptive_adaptive"
    head = ["Budget", "Static", "Share", *(text for policy in policies for text in (f"Adaptive, kv {policy}", "Share"))]
    assert part.tables[0].head == head
    assert part.tables[0].rows[0][:4] == ["70.0%", "3.500", "69.0%", "3.450"]
    assert part.tables[1].rows[1] == ["90.0%", "2.100 at 80.0%", "4.200 at 100.0%"]
    names = ["adaptive_pareto", "adaptive_domains", "adaptive_allocation", "adaptive_tokens_easy"]
    assert [picture.name for picture in part.pictures] == names
    pareto, domains, allocation, heat = part.pictures
    assert "static 3.500 at 69.0%, 3.500 at 89.0%" in pareto.alt
    assert "easy 0.300 at 70%, 0.100 at 90%; hard 0.600 at 70%, 0.200 at 90%" in domains.alt
    assert "easy 0.38, 0.38" in allocation.alt and "90.0%" in allocation.caption
    assert "60.0% to 90.0%" in heat.alt and "most: 'def'" in heat.alt


def evaluated(run, name: str, budget: float, **changes) -> None:
    mix = made()[0]["adaptive_budgets"][0]["adaptive"]["own"]
    mean = {"loss": mix.pop("mean_loss"), "perplexity": 20.0}
    metrics = {"stage": "evaluate", "cost": "latency", "full_cost": 9.0, "budget": budget, "kv_policy": "own", "mean": mean}
    synthetic.write(run / name, {**metrics, "perplexity": {"easy": 8.0, "hard": 60.0}, **mix, **changes})


def test_evaluations_of_tokens_that_choose(tmp_path):
    for name, budget in (("at_07", 0.7), ("at_09", 0.9)):
        evaluated(tmp_path, name, budget)
    found = synthetic.read(EVALUATED, tmp_path)
    assert [each.label for each in found] == ["at_07", "at_09"]
    (table,) = EVALUATED.sections(found)[0].tables
    assert table.head == ["Run", "Cost", "Budget", "KV policy", "easy", "hard", "Mean loss", "Share"]
    assert table.rows[0] == ["at_07", "latency", "70.0%", "own", "2.200 at 80.0%", "4.300 at 100.0%", "3.250", "90.0%"]
    page = build_report(tmp_path, tmp_path / "report", (*STATIC, *TOPICS))["index"].read_text()
    assert "Token routing, evaluated" in page
    evaluated(tmp_path, "lacking", 0.9, mean={})
    assert synthetic.problem(tmp_path, TOPICS).endswith("lacking/metrics.json: mean: lacks 'loss'")


def test_texts_of_users_are_escaped(tmp_path):
    metrics, log = made()
    metrics["token_costs"][0]["texts"] = ["<script>", "</main>", '" onload="']
    synthetic.write(tmp_path / "adaptive", metrics, log)
    page = build_report(tmp_path, tmp_path / "report", (*STATIC, *TOPICS))["index"].read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page and page.count("</main>") == 1 and ' onload="' not in page


@pytest.mark.parametrize("lost", ["adaptive_budgets", "full_loss", "token_costs"])
def test_a_missing_key_is_named(tmp_path, lost):
    metrics, log = made()
    del metrics[lost]
    synthetic.write(tmp_path / "adaptive", metrics, log)
    assert lost in synthetic.problem(tmp_path, TOPICS)
