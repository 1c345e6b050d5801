"""The sections of `compare` and `sensitivity`: the numbers in their tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

from flextron_mcore.report.collect import Run, collect
from flextron_mcore.report.sections_compare import comparison_sections, comparison_sentence, describe, sensitivity_sections
from flextron_mcore.space import LayerChoice, SubNetwork
from tests.report import synthetic

pytestmark = pytest.mark.usefixtures("undrawn")


def read(run, **stages) -> Run:
    for name, metrics in stages.items():
        synthetic.write(run / name, metrics)
    return collect(run)


@pytest.fixture
def parts(tmp_path):
    return {part.key: part for part in comparison_sections(read(tmp_path, compare=synthetic.compare()).comparisons)}


def test_loss_against_cost(parts):
    part = parts["compare"]
    (table,) = part.tables
    rows = [dict(zip(table.head, row, strict=True)) for row in table.rows]
    assert [row["Selector"] for row in rows[:6]] == ["full model", *["router"] * 4, "uniform"]
    routed, best = rows[4], synthetic.best(0.6)
    assert (routed["Target"], routed["Share"]) == ("60.0%", f"{100 * synthetic.share(best):.1f}%")
    assert (routed["Latency (ms)"], routed["Mean loss"]) == (f"{synthetic.COST.of(best):.3f}", f"{synthetic.loss(best):.3f}")
    assert routed["Loss, code"] == f"{synthetic.loss(best) - 0.2:.3f}"
    assert (rows[0]["Target"], rows[0]["Share"], rows[0]["Parameters"]) == ("–", "100.0%", "12,587,264")
    assert [rows[-1][key] for key in ("Selector", "Share", "Latency (ms)", "Mean loss", "Loss, code")] == [
        *("dense: without a cost", "–", "–", "3.420", "–")
    ]
    assert table.strong == 0 and len(rows) == 1 + 5 * 4 + 2
    assert [picture.name for picture in part.pictures] == ["compare_loss_cost", "compare_loss_parameters"]
    assert part.title == "Loss against latency"
    assert part.note.endswith("Measured on Toy GPU, bfloat16, prefill, batch size 2.") and "on 128 samples" in part.note


@pytest.mark.parametrize(("cost", "column"), [("memory", "Memory (MiB)"), ("parameters", None)])
def test_other_costs(tmp_path, cost, column):
    part = comparison_sections(read(tmp_path, compare=synthetic.compare(cost)).comparisons)[0]
    head = part.tables[0].head
    assert head[3:5] == ([column, "Parameters"] if column else ["Parameters", "Non-embedding parameters"])
    assert "Measured" not in part.note
    assert column is None or part.tables[0].rows[0][3] == "17.0"


def test_fits(parts):
    rows = parts["scaling"].tables[0].rows
    assert rows[0] == [
        *("router", "non-embedding parameters", "5"),
        *("4.71e6 (4e6 to 5.5e6)", "1.2 (−0.25 to 2.65)", "2.5 (2.4 to 2.6)"),
    ]
    assert rows[1][1] == "latency (ms)"
    assert rows[2] == ["matformer", "latency (ms)", "3", *["not determined"] * 3]


def test_random_networks(parts):
    table = parts["random"].tables[0]
    row = dict(zip(table.head, table.rows[-1], strict=True))
    given = synthetic.compare()["random"][0]
    losses = sorted(given["mean_losses"])
    assert (row["Budget"], row["Networks"]) == ("60.0%", str(len(losses)))
    assert (row["Best"], row["Worst"]) == (f"{losses[0]:.3f}", f"{losses[-1]:.3f}")
    assert row["Median"] == f"{losses[len(losses) // 2]:.3f}" and len(losses) % 2
    assert (row["Router"], row["Better than"]) == (f"{given['router_loss']:.3f}", f"{100 * given['better_than']:.1f}%")


def test_random_networks_without_routers(tmp_path):
    metrics = synthetic.compare()
    metrics["random"] = [
        {"target": 0.6, "shares": [0.6, 0.6, 0.6], "mean_losses": [float("nan"), 3.5, 3.0], "router_share": None},
        {"target": 0.5, "shares": [], "mean_losses": []},
    ]
    part = comparison_sections(read(tmp_path, compare=metrics).comparisons)[2]
    assert part.tables[0].rows == [["60.0%", "3", "3.000", "3.500", "NaN", "–", "–", "–"], ["50.0%", "0", *["–"] * 6]]
    assert len(part.pictures) == 1


def test_equal_cost(parts):
    rows = parts["equal"].tables[0].rows
    net = synthetic.SPACE.uniform(synthetic.MODEL, 4, 512)
    share, loss = f"{100 * synthetic.share(net):.1f}%", synthetic.loss(net)
    assert rows[1] == ["uniform", "50% heads, 50% FFN", share, f"{loss:.3f}", share, f"{loss - 0.05:.3f}", "−0.050"]
    assert [row[0] for row in rows] == ["uniform", "uniform", "matformer", "matformer"]


def test_equal_cost_without_routers(tmp_path):
    metrics = synthetic.compare()
    metrics["equal"] = [{**metrics["equal"][0], "router_share": None, "router_loss": None}]
    part = comparison_sections(read(tmp_path, compare=metrics).comparisons)[3]
    assert part.tables[0].rows[0][-3:] == ["–", "–", "–"]


def test_several_comparisons_are_told_apart(tmp_path):
    found = read(tmp_path, compare=synthetic.compare(), compare_memory=synthetic.compare("memory")).comparisons
    parts = comparison_sections(found)
    assert [part.key for part in parts[::4]] == ["compare", "compare2"] and len({part.key for part in parts}) == 8
    assert [part.title for part in parts[::4]] == ["Loss against latency (compare)", "Loss against memory (compare_memory)"]


def test_parts_without_data_are_left_out(tmp_path):
    metrics = {**synthetic.compare(), "random": [], "equal": [], "dense": [], "scaling_law": []}
    assert [part.key for part in comparison_sections(read(tmp_path, compare=metrics).comparisons)] == ["compare"]


def test_sentence(tmp_path):
    (c,) = read(tmp_path, compare=synthetic.compare()).comparisons
    text, better = comparison_sentence(c), 100 * c.random[0].better_than
    assert text.startswith("Asked for 60% of the full model’s latency, the routers choose a network with a mean loss of 3.765")
    assert f"against 3.000 of the full model and better than {better:.1f}% of random networks" in text
    assert comparison_sentence(replace(c, random=[])).endswith("against 3.000 of the full model.")
    assert comparison_sentence(replace(c, networks=[])) is None


def test_describe():
    uniform = synthetic.SPACE.uniform(synthetic.MODEL, 2, 768)
    assert describe(uniform, synthetic.MODEL) == "25% heads, 75% FFN"
    skipped = SubNetwork(256, (*uniform.layers[:4], *[LayerChoice(False, 8, 1, 1024)] * 4))
    assert describe(skipped, synthetic.MODEL) == "12% heads, 38% FFN (mean)"


def test_sensitivity(tmp_path):
    (part,) = sensitivity_sections(read(tmp_path, sensitivity=synthetic.sensitivity()).sensitivities)
    (table,) = part.tables
    assert table.head[:2] == ["Layer", "Heads 6 (75%)"] and table.head[-1] == "FFN 256 (25%)"
    given = {(b["layer"], b["axis"], b["size"]): b["degradation"] for b in synthetic.sensitivity()["blocks"]}
    ffn = [given[layer, "ffn_hidden_size", 256] for layer in range(8)]
    assert [row[-1] for row in table.rows] == [*(f"+{value:.3f}" for value in ffn), f"+{sum(ffn) / 8:.3f}"]
    assert [row[0] for row in table.rows] == [*map(str, range(1, 9)), "mean"] and table.strong == 8
    assert part.pictures[0].name == "sensitivity_degradation" and "(3.000 nats per token, 64 samples)" in part.note


def test_blocks_that_were_not_tried_are_blank(tmp_path):
    metrics = synthetic.sensitivity()
    metrics["blocks"] = [block for block in metrics["blocks"] if (block["layer"], block["axis"]) != (2, "heads")]
    (part,) = sensitivity_sections(read(tmp_path, sensitivity=metrics).sensitivities)
    assert part.tables[0].rows[2][1:4] == ["–", "–", "–"] and part.tables[0].rows[2][4] != "–"
