"""Tasks that `flextron evaluate` scores: made or loaded before the model is, and evaluated on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from flextron_mcore.config import FlextronError
from flextron_mcore.data.tokenizer import Tokenizer, open_tokenizer
from flextron_mcore.evaluation.heldout import KINDS, HeldoutTask, make
from flextron_mcore.runs.opened import Opened
from flextron_mcore.runs.terminal import print_table
from flextron_mcore.runs.tokenizers import end_tokens
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.settings.stages import EvaluateSettings

if TYPE_CHECKING:
    from flextron_mcore.evaluation.harness import Harness
    from flextron_mcore.evaluation.tasks import LoadedTasks

FOLDER = "tasks"  # in the output: the tasks that were made from held-out text
_OF_TASKS = ("tasks_dir", "tasks_trust_code", "num_fewshot", "limit", "apply_chat_template")


@dataclass(frozen=True)
class OpenedTasks:
    """Tasks, and the tokenizer that turns their texts into the model's tokens.

    Attributes:
        tokenizer: the checkpoint's tokenizer.
        ends: token ids that end a generated text.
        loaded: tasks, on rank 0; None on other ranks.
        heldout: tasks among them that were made from held-out text, on rank 0; [] on other ranks.
    """

    tokenizer: Tokenizer
    ends: frozenset[int]
    loaded: LoadedTasks | None
    heldout: Sequence[HeldoutTask]

    def harness(
        self, settings: EvaluateSettings, opened: Opened, chunks: Sequence[torch.nn.Module], progress: Callable[[int], object]
    ) -> Harness:
        """Harness of a loaded model.

        Args:
            settings: settings of the stage.
            opened: checkpoint and data.
            chunks: this rank's virtual-pipeline chunks of the model.
            progress: function called with a number of requests that are done.
        """
        from flextron_mcore.evaluation.harness import Harness  # late: as in `open_tasks`

        return Harness(
            chunks,
            self.tokenizer,
            opened.info.model.max_position_embeddings,
            self.ends,
            self.loaded,
            settings.model.micro_batch_size,
            settings.limit,
            settings.apply_chat_template,
            progress,
        )

    def write(self, out: Path, final: Path) -> None:
        """Write the tasks made from held-out text to `out`/tasks on rank 0. final: path of `out` when the stage has ended."""
        if self.heldout:
            (out / FOLDER).mkdir()
            for task in self.heldout:
                task.write(out / FOLDER, final.resolve() / FOLDER)


def open_tasks(settings: EvaluateSettings, opened: Opened) -> OpenedTasks | None:
    """Open the tasks of settings.tasks; None without any. Call on all ranks.

    Raises:
        FlextronError: a key for tasks is set without tasks; lm_eval is not installed; there is no tokenizer, or with
            apply_chat_template no chat template; a task cannot be made or loaded (`make`, `load_tasks`).
    """
    if not settings.tasks:
        for key in _OF_TASKS:
            if (value := getattr(settings, key)) not in (None, False):
                raise FlextronError(f"{key}={value}: has an effect with tasks= only: name tasks, or leave {key} out")
        return None
    if find_spec("lm_eval") is None:
        raise FlextronError("tasks: need the Python package lm-eval: pip install 'flextron_mcore[eval]', or leave tasks out")
    info, data = opened.info, opened.data
    folder = info.tokenizer or data.tokenizer
    tokenizer = open_tokenizer(folder)
    if (beyond := tokenizer.vocabulary.beyond(info.model.vocab_size)) is not None:
        raise FlextronError(
            f"tasks: the tokenizer in {folder} has the token {beyond[0][:40]!r} with id {beyond[1]}, and the model only rows 0 "
            f"to {info.model.vocab_size - 1}: import it again with `flextron import resize_vocabulary=true ...`"
        )
    if settings.apply_chat_template and not tokenizer.hf.chat_template:
        raise FlextronError(f"apply_chat_template=true: the tokenizer in {folder} has no chat template: leave it out")
    found: dict[str, Any] = {"loaded": None, "heldout": []}

    def load() -> None:
        from flextron_mcore.evaluation.tasks import load_tasks  # late: lm_eval is optional, and takes seconds to import

        names = [name for name in dict.fromkeys(settings.tasks) if name in KINDS]
        positions = info.model.max_position_embeddings
        found["heldout"] = make(names, data, open_tokenizer(data.tokenizer), positions, settings.seed) if names else []
        found["loaded"] = load_tasks(
            list(dict.fromkeys(settings.tasks)),
            found["heldout"],
            settings.tasks_dir,
            settings.tasks_trust_code,
            settings.num_fewshot,
        )

    on_main_process(load)
    return OpenedTasks(tokenizer, end_tokens(Path(folder), info, tokenizer.eod), found["loaded"], found["heldout"])


def print_scores(rows: Sequence[tuple[str, dict[str, Any], dict[str, Any]]]) -> None:
    """Print a table of tasks' metrics with standard errors, with four decimals as lm_eval prints them.

    rows: for each network its name, {heading: other cell}, and the result of `Harness.scores`.
    """
    _, others, first = rows[0]
    found = [(task, metric) for task, metrics in first.items() for metric in metrics]
    cells = [
        [name, *cells.values(), *(_with_error(tasks[task][metric]) for task, metric in found)] for name, cells, tasks in rows
    ]
    print_table("tasks", ["network", *others, *(f"{task} {metric}" for task, metric in found)], cells)


def _with_error(measured: dict[str, float | None]) -> str:
    """Value and standard error of a metric as text."""
    error = measured["stderr"]
    return f"{measured['value']:.4f}" + ("" if error is None else f" ± {error:.4f}")
