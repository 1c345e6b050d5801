"""Figures of a training run for TensorBoard, Weights & Biases and MLflow, by the keys of NeMo's exp_manager."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime.disk import write_whole
from flextron_mcore.settings.sections import ExperimentSettings
from flextron_mcore.settings.training import LoopSettings

PAUSE = 600  # seconds for which a server that failed is left alone
MLFLOW_KEYS = ("experiment_name", "run_name", "tracking_uri", "tags")


class Board:
    """Base class for places that show figures of a training."""

    def add(self, figures: Mapping[str, float], step: int) -> None:
        """Add figures of a step, {name: value}."""
        raise NotImplementedError

    def close(self) -> None:
        """Send or write what is left."""
        raise NotImplementedError


def check_boards(settings: ExperimentSettings) -> None:
    """Raise FlextronError if a logger that is asked for is not installed, or a key of it is missing or not known."""
    for key, wanted, name, package in (
        ("exp_manager.create_wandb_logger", settings.create_wandb_logger, "wandb", "wandb"),
        ("exp_manager.create_mlflow_logger", settings.create_mlflow_logger, "mlflow", "mlflow-skinny"),
    ):
        if wanted and importlib.util.find_spec(name) is None:
            raise FlextronError(f"{key}=true: {name} is not installed: pip install {package}, or set {key}=false")
    check_board_keys(settings)


def check_board_keys(settings: ExperimentSettings) -> None:
    """Raise FlextronError if a key of a logger that is asked for is missing or not known."""
    if settings.create_mlflow_logger:
        given = settings.mlflow_logger_kwargs
        if unknown := sorted(given.keys() - set(MLFLOW_KEYS)):
            raise FlextronError(f"exp_manager.mlflow_logger_kwargs.{unknown[0]}: is not known: use {', '.join(MLFLOW_KEYS)}")
        if "tracking_uri" not in given:
            raise FlextronError(
                "exp_manager.create_mlflow_logger=true: set exp_manager.mlflow_logger_kwargs.tracking_uri to that of your "
                "server, such as http://mlflow:5000"
            )


def open_boards(out: Path, step: int, settings: LoopSettings, say: Callable[[str], None]) -> list[Board]:
    """Boards that the settings of a run ask for. Call on the main process.

    Raises FlextronError if one cannot be opened, such as Weights & Biases without an account.

    Args:
        out: directory of the run.
        step: step that the run continues from, 0 for a new run.
        settings: settings of the run.
        say: receives a line when figures cannot be sent.
    """
    options, boards = settings.exp_manager, []
    if options.create_tensorboard_logger:
        boards.append(TensorBoard(out, step))
    for key, wanted, kind in (
        ("exp_manager.create_wandb_logger", options.create_wandb_logger, WandB),
        ("exp_manager.create_mlflow_logger", options.create_mlflow_logger, MLflow),
    ):
        if not wanted:
            continue
        try:
            boards.append(Remote(kind(out, step, settings), f"{settings.stage}: {key}", say))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise FlextronError(f"{key}=true: cannot be logged to: {reason}: correct its keys, or set {key}=false") from None
    return boards


class Remote(Board):
    """Board of a server. Its failure costs figures, not the training: after one, it is left alone for PAUSE seconds.

    Args:
        board: the board.
        name: begin of the line that is said.
        say: receives a line for each failure.
    """

    def __init__(self, board: Board, name: str, say: Callable[[str], None]) -> None:
        self.board, self.name, self.say, self.until = board, name, say, 0.0

    def add(self, figures: Mapping[str, float], step: int) -> None:
        if time.monotonic() >= self.until:
            self._try(lambda: self.board.add(figures, step), f"figures of step {step} and the next {PAUSE // 60} minutes")

    def close(self) -> None:
        self._try(self.board.close, "the end of the run")

    def _try(self, send: Callable[[], None], what: str) -> None:
        try:
            send()
        except Exception as error:
            self.until = time.monotonic() + PAUSE
            self.say(f"{self.name}: not sent: {what}: {' '.join(str(error).split())}")


class TensorBoard(Board):
    """Event files in the directory `tensorboard` of a run."""

    def __init__(self, out: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def add(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandB(Board):
    """Run of Weights & Biases, which a continued training continues. Its files are in the directory `wandb` of the run.

    Args:
        out: directory of the run.
        step: step that the run continues from, 0 for a new run.
        settings: settings of the run.
    """

    def __init__(self, out: Path, step: int, settings: LoopSettings) -> None:
        import wandb

        keys = dict(settings.exp_manager.wandb_logger_kwargs)
        offline = keys.pop("offline", False)
        keys = {"name": out.absolute().name, "dir": str(out), "config": asdict(settings), **keys}
        if offline:
            keys["mode"] = "offline"
        file = out / "wandb" / "run_id"
        if step and file.is_file():
            keys = {"id": file.read_text(encoding="utf-8"), "resume": "allow", **keys}
        self.run = wandb.init(**{"settings": wandb.Settings(silent=True, console="off"), **keys})
        file.parent.mkdir(exist_ok=True)
        write_whole(file, self.run.id)

    def add(self, figures: Mapping[str, float], step: int) -> None:
        self.run.log(dict(figures), step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow(Board):
    """Run of an MLflow server. A continued training adds to the run that it began with.

    Args:
        out: directory of the run.
        step: step that the run continues from, 0 for a new run.
        settings: settings of the run.
    """

    def __init__(self, out: Path, step: int, settings: LoopSettings) -> None:
        from mlflow import MlflowClient

        keys = settings.exp_manager.mlflow_logger_kwargs
        self.client = MlflowClient(keys["tracking_uri"])
        file = out / "mlflow" / "run_id"
        self.sent: dict[str, int] | None = None  # last step of each figure, by its name, in a run that is continued
        if step and file.is_file():
            self.id, self.sent = file.read_text(encoding="utf-8"), {}
            self.client.update_run(self.id, "RUNNING")
            return
        name = keys.get("experiment_name", "flextron")
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        run = self.client.create_run(experiment, run_name=keys.get("run_name", out.absolute().name), tags=keys.get("tags"))
        self.id = run.info.run_id
        file.parent.mkdir(exist_ok=True)
        write_whole(file, self.id)

    def add(self, figures: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now, metrics = int(time.time() * 1000), []
        for name, value in figures.items():
            # MLflow refuses other characters in a name.
            key = re.sub(r"[^/\w.\- :]", "_", name.replace("%", " percent"))
            if step > self._last(key):
                metrics.append(Metric(key, value, now, step))
        self.client.log_batch(self.id, metrics)

    def _last(self, key: str) -> int:
        """Last step that the run has of a figure, -1 without one: a killed run has figures of steps after its checkpoint."""
        if self.sent is None:
            return -1
        if key not in self.sent:
            self.sent[key] = max((metric.step for metric in self.client.get_metric_history(self.id, key)), default=-1)
        return self.sent[key]

    def close(self) -> None:
        self.client.set_terminated(self.id)
