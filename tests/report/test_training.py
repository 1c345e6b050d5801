"""The topic about training: what is read from metrics and log, and the groups of validated networks."""

from __future__ import annotations

import json

from flextron_mcore.report import training
from flextron_mcore.report.reader import Settings
from flextron_mcore.report.training import Training, TrainRow, validation_curves
from tests.report import synthetic
from tests.report.synthetic import ELASTIC


def made(label: str, names: list[str]) -> Training:
    rows = [(step, {name: 3.0 - step / 10 for name in names}) for step in (0, 5)]
    return Training(label, "elastic", 5, 1, 1.0, 1.0, [], rows, {}, {}, Settings())


def test_a_resumed_log_counts_the_later_row_of_a_step(tmp_path):
    rows = [(1, 5.0), (2, 4.0), (3, 9.0), (2, 3.5), (3, 3.0)]
    log = [{"step": s, "event": "train", "loss": v, "subnetwork_losses": [v + 1]} for s, v in rows]
    log += [{"step": s, "event": "validation", "losses": {"full": v}} for s, v in ((0, 6.0), (3, 3.1))]
    (found,) = synthetic.read(training.TOPIC, tmp_path, elastic=(ELASTIC, [*log, {"event": "checkpoint"}]))
    assert found.train == [TrainRow(1, 5.0, [6.0]), TrainRow(2, 3.5, [4.5]), TrainRow(3, 3.0, [4.0])]
    assert (found.first_loss, found.last_loss) == (6.0, 3.1)


def test_half_a_log_line_is_named(tmp_path):
    synthetic.write(tmp_path / "elastic", ELASTIC)
    log = tmp_path / "elastic" / "log.jsonl"
    log.write_text(json.dumps({"step": 1, "event": "train", "loss": 3.0}) + '\n{"step": 2, "ev', encoding="utf-8")
    assert synthetic.problem(tmp_path).startswith(f"{log}: line 2 ")


def test_stage_without_a_log_takes_validation_from_metrics(tmp_path):
    ends = {"first": {"losses": {"full": 5.0}}, "last": {"full": 4.0}}
    (found,) = synthetic.read(training.TOPIC, tmp_path, elastic={**ELASTIC, "validation": ends})
    assert (found.train, found.first_loss, found.last_loss) == ([], 5.0, 4.0)


def test_validation_networks_are_grouped():
    found = made("my elastic!", ["full", "uniform 50% heads 25% ffn", "random 1", "random 2", "mine"])
    pictures = validation_curves(found)
    names = [f"my_elastic__validation_{group}" for group in ("uniform", "random", "other")]
    assert [picture.name for picture in pictures] == names
    assert "random 2 3.000 to 2.500" in pictures[1].alt and "mine" not in pictures[1].alt
    assert validation_curves(made("pretrain", ["full"])) == []
