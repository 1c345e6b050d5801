"""The topic about sorting: the bar chart, and its alt text."""

from __future__ import annotations

from flextron_mcore.report.sorting import Ablation, AblationRow, ablation_bars, sections


def test_bars_name_the_score_when_there_are_several():
    rows = [
        AblationRow("full (baseline)", "unsorted", "l1", 3.0, 20.0),
        AblationRow("512 of 1024 FFN neurons", "unsorted", "l1", 6.0, 403.0),
    ]
    rows += [
        AblationRow("512 of 1024 FFN neurons", "sorted", score, loss, 90.0) for score, loss in (("l1", 4.5), ("l1 x weight", 4.4))
    ]
    alt = ablation_bars(rows, "sorting").alt
    assert (
        "512 of 1024 FFN neurons, sorted by l1 x weight: 4.400" in alt
        and "512 of 1024 FFN neurons, unsorted: 6.000" in alt
        and "full model: 3.000" in alt
    )


def test_a_score_for_each_axis_is_not_several_scores():
    rows = [
        AblationRow(setup, order, score if order == "sorted" else "", 4.0, 54.6)
        for setup, score in (("6 of 9 heads", "energy"), ("512 of 1024 FFN neurons", "activation"))
        for order in ("unsorted", "random", "sorted")
    ]
    alt = ablation_bars(rows, "sorting").alt
    assert "6 of 9 heads, sorted: 4.000" in alt and "6 of 9 heads, random: 4.000" in alt and "sorted by" not in alt


def test_each_of_several_results_is_named():
    rows = [AblationRow("6 of 9 heads", "sorted", "energy", 4.0, 54.6)]
    one, two = Ablation("sorted", 64, rows), Ablation("sorted_four", 64, rows)
    alone, both = sections([one])[0], sections([one, two])[0]
    assert [table.head[0] for table in alone.tables] == ["Setup"] and alone.pictures[0].caption.startswith("Loss")
    assert [table.head[0] for table in both.tables] == ["Setup (sorted)", "Setup (sorted_four)"]
    assert [picture.caption.partition(":")[0] for picture in both.pictures] == ["sorted", "sorted_four"]
