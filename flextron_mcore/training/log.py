"""Log of a training run: log.jsonl, boards, and lines or a progress bar on the terminal."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flextron_mcore.runtime.disk import write_whole
from flextron_mcore.runtime.progress import INTERVAL, Progress, duration_text
from flextron_mcore.runtime.ranks import is_main_process
from flextron_mcore.settings.training import LoopSettings
from flextron_mcore.training.boards import open_boards
from flextron_mcore.training.speed import MEASURED

LOG_FILE = "log.jsonl"
# Figures of a step that boards show if the phase has them.
SCALARS = ("learning_rate", "grad_norm", "tokens_per_second", "surrogate_loss", "surrogate_error", "constraint_loss")
SOMETIMES = ("consumed_samples", *MEASURED)  # every trainer.log_every_n_steps steps


class Log:
    """Log of a training run, written by the main process only; other ranks do nothing.

    Args:
        out: directory of the run.
        step: step of the checkpoint that the run continues from, 0 for a new run. Later rows of an old log are dropped.
        settings: settings of the run.

    Attributes:
        first_validation: {network: loss in nats per token} that the old log has of the validation before the first step, or {}.
        last_validation: {network: loss in nats per token} that it has of the validation after `step`, or {}.
    """

    def __init__(self, out: Path, step: int, settings: LoopSettings) -> None:
        self.first_validation: dict[str, float] = {}
        self.last_validation: dict[str, float] = {}
        self.active, self.stage = is_main_process(), settings.stage
        if not self.active:
            return
        path = out / LOG_FILE
        rows = _whole_rows(path)
        kept = [row for row in rows if row["step"] <= step] if step else []
        for row in kept:
            if row["event"] == "validation" and row["step"] == 0:
                self.first_validation = row["losses"]
            if row["event"] == "validation" and row["step"] == step:
                self.last_validation = row["losses"]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = path.open("a", encoding="utf-8")
        self.boards = open_boards(out, step, settings, self._say)
        self.every = settings.trainer.log_every_n_steps
        self.terminal = sys.stderr.isatty()
        self.max_steps, self.first = settings.trainer.max_steps, step
        self.begun = self.said = time.monotonic()
        self.bar = tqdm(total=self.max_steps, initial=step, desc=self.stage, unit="step", disable=not self.terminal)
        if step:
            self._say(f"{self.stage}: continuing after step {step}")

    def train(self, row: dict[str, Any]) -> None:
        """Write a training step to log.jsonl, the boards and the terminal.

        row: {"step", "event": "train", "loss", "tokens_per_second", "memory_gb"} and further figures of the step; losses in nats
        per token.
        """
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
        if row.get("grad_norm") is not None:
            figures["grad norm"] = f"{row['grad_norm']:.2f}"
        figures["tok/s"] = f"{row['tokens_per_second']:.0f}"
        if "mfu" in row:
            figures |= {"TFLOP/s": f"{row['tflops_per_sec_per_gpu']:.0f}", "MFU": f"{row['mfu']:.1%}"}
        figures["GB"] = f"{row['memory_gb']:.1f}"
        self.bar.set_postfix(figures)
        self.bar.update(1)
        due = row["step"] % self.every == 0 or time.monotonic() - self.said >= INTERVAL
        if not self.terminal and (due or row["step"] in (self.first + 1, self.max_steps)):
            text = "  ".join(f"{name} {value}" for name, value in figures.items())
            seconds = (time.monotonic() - self.begun) / (row["step"] - self.first) * (self.max_steps - row["step"])
            left = f", {duration_text(seconds)} left" if seconds else ""
            self._say(f"{self.stage}: step {row['step']}/{self.max_steps}{left}  {text}")
        names = (*SCALARS, *SOMETIMES) if row["step"] % self.every == 0 else SCALARS
        shown = {"train/loss": row["loss"]}
        shown |= {f"train/subnetwork_{i + 1}_loss": loss for i, loss in enumerate(row.get("subnetwork_losses", []))}
        shown |= {f"train/{name}": row[name] for name in names if row.get(name) is not None}
        self._show(shown, row["step"])

    def note(self, text: str) -> None:
        """Say a line on the terminal; nothing if it is empty."""
        if self.active and text:
            self._say(text)

    def validating(self, step: int, passes: int) -> Progress:
        """Make a progress bar for a validation.

        Args:
            step: training step after which the validation runs.
            passes: number of evaluations of a network on a domain.
        """
        return Progress(total=passes, desc=f"{self.stage}: validation after step {step}", unit="evaluation", leave=False)

    def validation(self, row: dict[str, Any]) -> None:
        """Write a validation to log.jsonl, the boards and the terminal.

        row: {"step", "event": "validation", "losses": {network: mean over domains}, "domains": {network: {domain: loss}}}, losses
        in nats per token.
        """
        if not self.active:
            return
        if row["step"] == self.first:
            self.begun = time.monotonic()  # the remaining time is estimated from steps only
        self._write(row)
        text = "  ".join(f"{name} {loss:.3f}" for name, loss in row["losses"].items())
        self._say(f"{self.stage}: validation after step {row['step']}: {text}")
        self._show({f"validation/{name}": loss for name, loss in row["losses"].items()}, row["step"])

    def close(self) -> None:
        """Close the files and the progress bar."""
        if self.active:
            self.bar.close()
            self.file.close()
            for board in self.boards:
                board.close()

    def _write(self, row: dict[str, Any]) -> None:
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def _show(self, figures: dict[str, float], step: int) -> None:
        for board in self.boards:
            board.add(figures, step)

    def _say(self, text: str) -> None:
        self.said = time.monotonic()
        if self.terminal:
            tqdm.write(text, file=sys.stderr)
        else:
            print(text, flush=True)


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a log file, without damaged lines (a killed run may leave half a line); [] if there is no file."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int) and "event" in row]
