"""The topic about sorting: the bars and what they say in words."""

from __future__ import annotations

from flextron_mcore.report.sorting import AblationRow, ablation_bars


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
