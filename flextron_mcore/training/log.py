"""The record of a training run: log.jsonl, TensorBoard, and the progress bar."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flextron_mcore.runtime.disk import write_whole
from flextron_mcore.runtime.ranks import is_main_process
from flextron_mcore.settings.training import LoopSettings

LOG_FILE = "log.jsonl"
# Figures of a step that TensorBoard gets, where the phase has them.
SCALARS = ("learning_rate", "grad_norm", "tokens_per_second", "surrogate_loss", "surrogate_error", "constraint_loss")


class Log:
    """log.jsonl, TensorBoard, and the progress bar; on the main process only.

    A resumed run drops the rows after the checkpoint it continues from.
    """

    def __init__(self, out: Path, step: int, settings: LoopSettings) -> None:
        self.first_validation: dict[str, float] = {}
        self.active = is_main_process()
        if not self.active:
            return
        path = out / LOG_FILE
        rows = _whole_rows(path)
        kept = [row for row in rows if row["step"] <= step] if step else []
        for row in kept:
            if row["event"] == "validation" and row["step"] == 0:
                self.first_validation = row["losses"]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = path.open("a", encoding="utf-8")
        self.board = None
        if settings.exp_manager.create_tensorboard_logger:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self.every = settings.trainer.log_every_n_steps
        self.terminal = sys.stderr.isatty()
        self.max_steps, self.stage = settings.trainer.max_steps, settings.stage
        self.bar = tqdm(total=self.max_steps, initial=step, desc=self.stage, unit="step", disable=not self.terminal)
        if step:
            self._say(f"{self.stage}: continuing after step {step}")

    def train(self, row: dict[str, Any]) -> None:
        if not self.active:
            return
        self._write(row)
        figures = {"loss": f"{row['loss']:.3f}"}
        if "subnetwork_losses" in row:
            subs = row["subnetwork_losses"]
            figures["sub-networks"] = f"{sum(subs) / len(subs):.3f}"
        if "surrogate_error" in row:
            figures["surrogate"] = f"{row['surrogate_error']:.2f}" + (
                "" if row["routers_follow_surrogate"] else " (not followed)"
            )
        if "constraint_loss" in row:
            figures["constraint"] = f"{row['constraint_loss']:.3f}"
        if "learning_rate" in row:
            figures["lr"] = f"{row['learning_rate']:.1e}"
        figures["tok/s"] = f"{row['tokens_per_second']:.0f}"
        self.bar.set_postfix(figures)
        self.bar.update(1)
        if not self.terminal and (row["step"] % self.every == 0 or row["step"] == self.max_steps):
            text = "  ".join(f"{name} {value}" for name, value in figures.items())
            self._say(f"{self.stage}: step {row['step']}/{self.max_steps}  {text}")
        if self.board:
            self.board.add_scalar("train/loss", row["loss"], row["step"])
            for i, loss in enumerate(row.get("subnetwork_losses", [])):
                self.board.add_scalar(f"train/subnetwork_{i + 1}_loss", loss, row["step"])
            for name in SCALARS:
                if row.get(name) is not None:
                    self.board.add_scalar(f"train/{name}", row[name], row["step"])

    def validation(self, row: dict[str, Any]) -> None:
        if not self.active:
            return
        self._write(row)
        text = "  ".join(f"{name} {loss:.3f}" for name, loss in row["losses"].items())
        self._say(f"{self.stage}: validation after step {row['step']}: {text}")
        if self.board:
            for name, loss in row["losses"].items():
                self.board.add_scalar(f"validation/{name}", loss, row["step"])

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.file.close()
            if self.board:
                self.board.close()

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def _say(self, text: str) -> None:
        if self.terminal:
            tqdm.write(text, file=sys.stderr)
        else:
            print(text, flush=True)


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, without lines that are damaged: a kill cuts the last one short."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int) and "event" in row]
