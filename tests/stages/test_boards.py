"""Weights & Biases and MLflow: stand-ins record what they get. The packages themselves are tested where they are installed."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime import signals
from flextron_mcore.training import boards
from flextron_mcore.training.log import Log
from flextron_mcore.training.speed import MEASURED
from tests.stages.conftest import pretrain_keys, stage

WANDB = ["exp_manager.create_wandb_logger=true", "exp_manager.wandb_logger_kwargs={project: p, offline: true, tags: [a]}"]
MLFLOW = ["exp_manager.create_mlflow_logger=true", "exp_manager.mlflow_logger_kwargs={tracking_uri: 'http://m:5000'}"]


def expected(run: Path) -> dict[str, dict[int, float]]:
    """{name of a figure: {step: value}} from log.jsonl."""
    found: dict[str, dict[int, float]] = {}
    for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        figures = ("loss", "grad_norm", "consumed_samples", *MEASURED)
        names = {f"train/{name}": row.get(name) for name in figures}
        names |= {f"validation/{name}": loss for name, loss in row.get("losses", {}).items()}
        for name, value in names.items():
            if value is not None:
                found.setdefault(name, {})[row["step"]] = value
    return found


def keys(chain: Path, out: Path, *more: str) -> list[str]:
    return [*pretrain_keys(chain / "data"), "trainer.max_steps=4", "trainer.log_every_n_steps=1", f"out={out}", *more]


class Recorder:
    """Stand-in for a package: calls that begin a run, and the figures of each run."""

    def __init__(self) -> None:
        self.begun: list[dict] = []
        self.figures: dict[str, dict[int, float]] = {}
        self.ended = 0
        self.away = False  # True if the server does not answer

    def add(self, name: str, value: float, step: int) -> None:
        self.figures.setdefault(name, {})[step] = value

    def seen(self, run: Path) -> dict[str, dict[int, float]]:
        return {name: self.figures.get(name) for name in expected(run)}


@pytest.fixture
def wandb(monkeypatch) -> Recorder:
    recorder, module = Recorder(), ModuleType("wandb")

    def init(**given: object) -> SimpleNamespace:
        recorder.begun.append(given)
        log = lambda figures, step: [recorder.add(name, value, step) for name, value in figures.items()]  # noqa: E731
        finish = lambda: setattr(recorder, "ended", recorder.ended + 1)  # noqa: E731
        return SimpleNamespace(id=given.get("id", "id0"), log=log, finish=finish)

    module.init, module.Settings = init, lambda **given: given
    module.__spec__ = SimpleNamespace(name="wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    return recorder


@pytest.fixture
def mlflow(monkeypatch) -> Recorder:
    recorder, module = Recorder(), ModuleType("mlflow")

    class Client:
        def __init__(self, uri: str) -> None:
            recorder.begun.append({"uri": uri})

        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str) -> str:
            return name

        def create_run(self, experiment: str, run_name: str, tags: object) -> SimpleNamespace:
            recorder.begun[-1] |= {"experiment": experiment, "name": run_name}
            return SimpleNamespace(info=SimpleNamespace(run_id=f"r{len(recorder.begun)}"))

        def update_run(self, number: str, status: str) -> None:
            recorder.begun[-1] |= {"continued": number}

        def log_batch(self, number: str, metrics: list[SimpleNamespace]) -> None:
            assert number == "r1"
            if recorder.away:
                raise ConnectionError("no route\nto host")
            for metric in metrics:
                assert re.fullmatch(r"[/\w.\- :]+", metric.key)  # the characters that MLflow allows in names
                assert metric.step not in recorder.figures.get(metric.key, {})  # MLflow would keep both values
                recorder.add(metric.key, metric.value, metric.step)

        def get_metric_history(self, number: str, name: str) -> list[SimpleNamespace]:
            return [SimpleNamespace(step=step) for step in recorder.figures.get(name, {})]

        def set_terminated(self, number: str) -> None:
            recorder.ended += 1

    entities = ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: SimpleNamespace(key=key, value=value, step=step)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    module.MlflowClient = Client
    module.__spec__ = SimpleNamespace(name="mlflow")
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return recorder


def stopped_within(monkeypatch, moment: int) -> None:
    """Let SIGTERM arrive before micro-batch `moment` of a training, until the undo of `monkeypatch`."""
    calls = 0

    def urgent() -> bool:
        nonlocal calls
        calls += 1
        return calls >= moment

    monkeypatch.setattr(signals, "ignore", lambda: None)
    monkeypatch.setattr(signals, "urgent", urgent)


def test_both_get_the_figures_of_the_log_and_one_run_when_continued(chain, tmp_path, monkeypatch, capsys, wandb, mlflow):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopped_within(patch, 12)
        with pytest.raises(signals.Stopped):
            stage("pretrain", *keys(chain, run, *WANDB, *MLFLOW))
    stage("pretrain", *keys(chain, run, *WANDB, *MLFLOW))
    assert wandb.seen(run) == mlflow.seen(run) == expected(run) and len(expected(run)["train/loss"]) == 4
    assert {"train/tokens_per_second", "train/tflops_per_sec_per_gpu", "train/memory_gb", "train/step_seconds"} < set(
        expected(run)
    )
    assert expected(run)["train/consumed_samples"] == {step: 8.0 * step for step in (1, 2, 3, 4)}
    said = capsys.readouterr().out
    assert "GB" in said and "grad norm" in said and "MFU" not in said + (run / "log.jsonl").read_text()
    first, second = wandb.begun
    assert (first["project"], first["mode"], first["tags"], first["name"]) == ("p", "offline", ["a"], "run")
    assert (
        "id" not in first
        and (second["id"], second["resume"]) == ("id0", "allow")
        and first["config"]["trainer"]["max_steps"] == 4
    )
    assert mlflow.begun[0]["experiment"] == "flextron" and mlflow.begun[1]["continued"] == "r1"
    assert wandb.ended == mlflow.ended == 2


@pytest.mark.parametrize(
    "more, message",
    [
        (WANDB, "exp_manager.create_wandb_logger=true: wandb is not installed: pip install wandb, or set"),
        (MLFLOW, "exp_manager.create_mlflow_logger=true: mlflow is not installed: pip install mlflow-skinny, or set"),
    ],
)
def test_a_package_that_is_missing_is_named(chain, tmp_path, monkeypatch, more, message):
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FlextronError, match=message):
        stage("pretrain", *keys(chain, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given, message",
    [
        ("{}", "exp_manager.create_mlflow_logger=true: set exp_manager.mlflow_logger_kwargs.tracking_uri to that of your server"),
        ("{tracking_uri: a, uri: b}", "exp_manager.mlflow_logger_kwargs.uri: is not known: use experiment_name"),
    ],
)
def test_keys_of_mlflow(chain, tmp_path, mlflow, given, message):
    with pytest.raises(FlextronError, match=message):
        stage("pretrain", *keys(chain, tmp_path / "run", MLFLOW[0], f"exp_manager.mlflow_logger_kwargs={given}"))
    assert not (tmp_path / "run").exists()


def test_what_the_package_says_is_one_line(chain, tmp_path, wandb, monkeypatch):
    def refuse(**given: object) -> None:
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    with pytest.raises(
        FlextronError, match=r"create_wandb_logger=true: cannot be logged to: api_key not configured \(no-tty\): correct"
    ):
        stage("pretrain", *keys(chain, tmp_path / "run", *WANDB))


def test_names_of_networks_suit_mlflow(chain, tmp_path, mlflow):
    """Validation of an elastic training logs names such as `uniform 50% heads 50% ffn`, and MLflow refuses %."""
    run = tmp_path / "run"
    more = [
        "trainer.max_steps=2",
        "trainer.log_every_n_steps=1",
        "trainer.limit_val_batches=1",
        "model.global_batch_size=8",
        *MLFLOW,
    ]
    stage("elastic", f"checkpoint={chain}/sorted", f"data={chain}/data", *more, f"out={run}")
    seen = {name.replace("%", " percent"): values for name, values in expected(run).items()}
    assert any(" percent heads" in name for name in seen) and {name: mlflow.figures.get(name) for name in seen} == seen


def test_steps_that_are_trained_again_are_not_sent_twice(chain, tmp_path, monkeypatch, mlflow):
    """A killed run has sent figures of steps after its checkpoint, which the continued run trains again."""
    run = tmp_path / "run"
    more = ["exp_manager.checkpoint_callback_params.every_n_train_steps=2", *MLFLOW]
    written = Log.train

    def killed(log: Log, row: dict) -> None:
        written(log, row)
        if row["step"] == 3:
            raise RuntimeError

    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr(Log, "train", killed)
        stage("pretrain", *keys(chain, run, *more))
    stage("pretrain", *keys(chain, run, *more))
    assert [sorted(mlflow.figures[name]) for name in ("train/loss", "validation/full")] == [
        sorted(expected(run)[name]) for name in ("train/loss", "validation/full")
    ]


def test_a_server_that_is_away_costs_figures_only(chain, tmp_path, mlflow, monkeypatch, capsys):
    run = tmp_path / "run"
    mlflow.away = True
    stage("pretrain", *keys(chain, run, *MLFLOW))
    said = "pretrain: exp_manager.create_mlflow_logger: not sent: figures of step 0 and the next 10 minutes: no route to host"
    assert capsys.readouterr().out.count(said) == 1 and mlflow.figures == {}
    assert (run / "metrics.json").is_file()
    monkeypatch.setattr(boards, "PAUSE", 0)
    stage("pretrain", *keys(chain, tmp_path / "other", *MLFLOW))
    assert capsys.readouterr().out.count("not sent: figures of step") > 4


def test_the_package_wandb_offline(chain, tmp_path):
    pytest.importorskip("wandb", reason="wandb is not installed")
    stage("pretrain", *keys(chain, tmp_path / "run", *WANDB))
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert file.stat().st_size > 0


def test_the_package_mlflow_in_files(chain, tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"file:{tmp_path}/mlflow"
    stage("pretrain", *keys(chain, tmp_path / "run", MLFLOW[0], f"exp_manager.mlflow_logger_kwargs={{tracking_uri: '{uri}'}}"))
    client, number = MlflowClient(uri), (tmp_path / "run" / "mlflow" / "run_id").read_text()
    for name, values in expected(tmp_path / "run").items():
        name = name.replace("%", " percent")
        assert {metric.step: metric.value for metric in client.get_metric_history(number, name)} == values
