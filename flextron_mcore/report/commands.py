"""Commands that may follow a run, for the last chapter of the report. No torch import."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from flextron_mcore.report.reader import StageOutput

MODELS = ("pretrain", "import", "importance", "elastic", "gumbel", "router", "joint")  # stages with a checkpoint, latest last


def next_commands(outputs: Sequence[StageOutput]) -> list[tuple[str, str]]:
    """(purpose, command line) of the stages that may follow those of a run; [] if no stage of it wrote a checkpoint.

    Stages that trained adaptive routers do not count: the commands would need selector=adaptive.
    """
    found = {output.kind: output.directory for output in outputs if not _of_tokens(output)}
    model = next((kind for kind in MODELS[::-1] if kind in found), None)
    if model is None:
        return []
    run = outputs[0].run
    checkpoint, data = f"checkpoint={found[model]}", f"data={found.get('prepare', 'DATA')}"
    if model in ("pretrain", "import"):
        return [_line("Sort the model’s units by importance", "importance", checkpoint, data, f"out={run / 'sorted'}")]
    if model == "importance":
        return [_line("Train the elastic model", "elastic", checkpoint, data, f"out={run / 'elastic'}")]
    commands = []
    if "evaluate" not in found:
        commands.append(_line("Evaluate networks of every size", "evaluate", checkpoint, data, f"out={run / 'evaluate'}"))
    if model == "elastic":
        commands.append(_line("Train routers that choose a network", "router", checkpoint, data, f"out={run / 'router'}"))
    elif "compare" not in found:
        commands.append(_line("Compare the routers with chance", "compare", checkpoint, data, f"out={run / 'compare'}"))
    targets = next((t for output in outputs if output.directory == found[model] and (t := _targets(output))), [0.75])
    budget = targets[len(targets) // 2]
    chosen = [checkpoint, f"budget={budget:g}", *(["selector=uniform"] if model == "elastic" else [])]
    return [
        _line(f"See the network of {100 * budget:.3g}% of the full model’s cost", "select", *chosen),
        _line("Let it write", "generate", *chosen, "prompt=The"),
        _line("Cut it out as a Hugging Face model", "export", *chosen, f"out={run / 'small'}"),
        *commands,
    ]


def _targets(output: StageOutput) -> list[float]:
    """Budgets at which routers were validated, as shares of the full model's cost; [] for a stage without routers."""
    return [row.read("target", float) for row in output.metrics.rows("budgets")] if output.metrics.has("budgets") else []


def _of_tokens(output: StageOutput) -> bool:
    """True if a stage trained adaptive routers. No command is proposed for it: budgets would need selector=adaptive."""
    routers = output.metrics.values.get("routers")
    return isinstance(routers, dict) and routers.get("kind") is not None


def _line(purpose: str, *words: str) -> tuple[str, str]:
    """(purpose, command line of `flextron` with these words, quoted for a shell)."""
    return purpose, shlex.join(["flextron", *words])
