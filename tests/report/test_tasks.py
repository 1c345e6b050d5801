"""The section about tasks: every metric of lm_eval, and accuracies with their standard errors."""

from __future__ import annotations

from matplotlib.figure import Figure

from flextron_mcore.report import drawing, evaluation, tasks
from tests.report import synthetic

SCORES = [
    {"lambada": {"perplexity": {"value": 12.34567, "stderr": None}, "acc": {"value": 0.5, "stderr": 0.25}}},
    {"lambada": {"perplexity": {"value": 23.4, "stderr": 1.5}, "acc": {"value": 0.125, "stderr": 0.0625}}},
]


def test_scores_of_networks(tmp_path):
    sizes = (2_000_000, 1_000_000)
    nets = [{**synthetic.NETWORK, "parameters": n, "tasks": scores} for n, scores in zip(sizes, SCORES, strict=True)]
    found = synthetic.read(evaluation.TOPIC, tmp_path, evaluate={**synthetic.EVALUATE, "networks": nets})
    (section,) = [section for section in evaluation.sections(found) if section.title == "Tasks"]
    (table,) = section.tables
    assert table.head[2:] == ["lambada, perplexity", "lambada, acc"]
    assert [row[1:] for row in table.rows] == [
        ["2,000,000", "12.3457", "0.5000 ± 0.2500"],
        ["1,000,000", "23.4000 ± 1.5000", "0.1250 ± 0.0625"],
    ]
    (picture,) = section.pictures
    assert "lambada: 0.1250 ± 0.0625 at 1, 0.5000 ± 0.2500 at 2." in picture.alt


def test_the_bars_of_the_chart_are_standard_errors():
    figure = Figure()
    tasks.draw(figure, drawing.LIGHT, "Parameters", {"one": [(1.0, tasks.Measured(0.1, None)), (2.0, tasks.Measured(0.5, 0.25))]})
    (container,) = figure.axes[0].containers
    ends = [[round(float(y), 3) for _, y in segment] for segment in container.lines[2][0].get_segments()]
    assert ends == [[0.1, 0.1], [0.25, 0.75]]
