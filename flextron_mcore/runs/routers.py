"""Training of routers, shared by `flextron router`, `joint` and `gumbel`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Cost
from flextron_mcore.data.blend import PreparedData, train_dataset
from flextron_mcore.evaluation.perplexity import evaluate
from flextron_mcore.latency.table import LatencyTable
from flextron_mcore.routers.store import RouterInfo
from flextron_mcore.runs.choice import available_costs, memory_setting
from flextron_mcore.runs.output import write_metrics
from flextron_mcore.runs.resume import resumable_output
from flextron_mcore.runs.terminal import print_table, progress_bar, warn
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.settings.schema import show as show_value
from flextron_mcore.settings.sections import DistillationSettings, TargetSettings
from flextron_mcore.settings.training import CostSettings, NewRouterSettings
from flextron_mcore.space import SubNetwork
from flextron_mcore.training.candidates import evaluate_candidates
from flextron_mcore.training.loop import Chunks, Phase, train
from flextron_mcore.training.router import RouterLearner, RouterTraining
from flextron_mcore.training.static import SurrogateLearner


def described_routers(
    settings: NewRouterSettings, info: CheckpointInfo, table: LatencyTable | None, hidden_size: int
) -> tuple[RouterInfo, list[Cost]]:
    """Describe routers that are to be trained: the costs that their budgets limit, and the range of budgets of each cost.

    Args:
        settings: settings of the stage; `costs` (by default latency if there is a table, else parameters), `targets` and the keys
            of `memory_setting` are read.
        info: checkpoint with the elastic space from which the routers choose.
        table: latency table; None: no cost `latency`.
        hidden_size: hidden units of the routers.

    Returns:
        Description to store beside the routers, and the costs in the same order.

    Raises:
        FlextronError: an unknown cost, or a range of budgets that is not within the costs of the smallest and the full network.
    """
    available = available_costs(settings, info, table)
    names = settings.costs or (["latency"] if table else ["parameters"])
    names = [names] if isinstance(names, str) else list(names)
    if len(set(names)) < len(names):
        raise FlextronError(f"costs={show_value(names)}: has one twice: name each once")
    for name in names:
        if name not in available:
            hint = ": give latency=, a table of `flextron latency`" if name == "latency" else ""
            raise FlextronError(f"costs: {name!r} is not available here{hint}; available: {', '.join(available)}")
    costs = [available[name] for name in names]
    ranges = [_range(settings.targets, cost) for cost in costs]
    return RouterInfo(tuple(names), tuple(ranges), hidden_size, memory_setting(settings, info)), costs


def router_training(
    settings: CostSettings, choices: Choices, costs: Sequence[Cost], described: RouterInfo, table: LatencyTable | None
) -> RouterTraining:
    """Parameters of the training of static routers: choices, costs, seed, steps and targets of a step.

    Args:
        settings: settings of the stage.
        choices: choices that the routers make, one candidate each.
        costs: costs that budgets limit.
        described: description of the routers, stored in checkpoints.
        table: latency table, stored in checkpoints; None without.
    """
    kept = table.to_dict() if table else None
    return RouterTraining(choices, costs, described, settings.targets_per_step, settings.seed, settings.trainer.max_steps, kept)


def train_routers(
    settings: CostSettings,
    info: CheckpointInfo,
    data: PreparedData,
    learner: RouterLearner,
    seq_length: int,
    frozen: bool,
    teach: DistillationSettings | None = None,
    teacher: CheckpointInfo | None = None,
) -> dict[str, Any]:
    """Train routers, print the networks that they choose, and write metrics.json. Call on all ranks.

    Args:
        settings: settings of the stage.
        info: checkpoint to start from.
        data: training data.
        learner: routers in training.
        seq_length: tokens of a sample.
        frozen: True if the model's weights stay as they are, and only the routers learn.
        teach: settings of the distillation; None: none.
        teacher: checkpoint of the frozen teacher of all networks; None: the full model teaches the sub-networks of its step.

    Returns:
        Content of metrics.json: the results of `train`, "routers": {"costs", "surrogate" (True with one), and of a surrogate
        "threshold" and "steps_followed"}, "budgets": a row of `_budget` for each validation target.

    Raises:
        FlextronError: settings.out holds something else than this run, a validation target is out of range, or a loss is not
            finite.
    """
    cost = learner.costs[0]
    targets = validation_targets(settings.validation_targets, cost, learner.info.ranges[0])

    def choices() -> dict[str, Any]:
        return on_main_process(lambda: {f"router {target:g}": learner.choose(target) for target in targets})

    phase = Phase(
        networks=learner.step_networks,
        validation=lambda step: {"full": None, **choices()},
        teach=teach or DistillationSettings(),
        teacher=teacher,
        learner=learner,
        frozen=frozen,
    )
    with resumable_output(settings, info, data) as out:
        if settings.candidate_samples:
            phase.after = {settings.trainer.max_steps: partial(_evaluate_candidates, settings, out, data, learner, seq_length)}
        figures = train(settings, out, info, data, phase, seq_length)
        rows = on_main_process(lambda: [_budget(learner, target) for target in targets])
        first, last = figures["validation"]["first"], figures["validation"]["last"]
        names = [f"router {target:g}" for target in targets]
        print_table(
            f"networks that the routers choose: share of the full model's {cost.name}, validation loss (nats per token)",
            ["target", "share", "argmax alone", "loss before", "loss"],
            [
                [f"{row['target']:g}", row["share"], row["argmax_share"], first.get(name, "-"), last[name]]
                for row, name in zip(rows, names, strict=True)
            ]
            + [["full", 1.0, 1.0, first.get("full", "-"), last["full"]]],
        )
        described: dict[str, Any] = {"costs": list(learner.info.costs), "surrogate": isinstance(learner, SurrogateLearner)}
        if isinstance(learner, SurrogateLearner):
            followed = on_main_process(lambda: learner.steps_followed)
            described |= {"threshold": learner.surrogate_settings.threshold, "steps_followed": followed}
            if not followed:
                warn(
                    "the surrogate's error never fell below surrogate.threshold, so the routers have learned to "
                    "meet budgets, but not which network is good: train longer, or with a larger model.global_batch_size"
                )
        return write_metrics(out, settings.stage, {**figures, "routers": described, "budgets": rows})


def _evaluate_candidates(
    settings: CostSettings, out: Path, data: PreparedData, learner: RouterLearner, seq_length: int, model: Chunks
) -> None:
    """Find good networks for budgets of the routers' first cost, and store their losses in `learner.info.evaluated`.

    Losses are evaluated on training samples (training/candidates.py). A budget of this cost then gets one of these networks. Call
    on all ranks.

    Args:
        settings: settings of the stage; `candidate_samples` is the number of samples.
        out: directory of the run.
        data: training data.
        learner: trained routers.
        seq_length: tokens of a sample.
        model: this rank's virtual-pipeline chunks in evaluation mode.
    """
    samples = settings.candidate_samples
    dataset = train_dataset(data, seq_length, samples, settings.seed, out / "cache", settings.data_weights)

    def evaluated(networks: Sequence[SubNetwork], count: int) -> list[float]:
        names = {str(i): net for i, net in enumerate(networks)}
        with progress_bar(total=len(networks), desc="candidates", unit="network") as bar:
            size = settings.model.micro_batch_size
            found = evaluate(model, {"train": dataset}, names, seq_length, size, count, lambda _: bar.update())
        return [found[name]["train"] for name in names]

    losses = evaluate_candidates(learner, evaluated, samples)
    indices = ((tuple(learner.choices.indices(net)), loss) for net, loss in losses.items())
    learner.info = replace(learner.info, evaluated=tuple(indices))


def validation_targets(wanted: Sequence[float] | None, cost: Cost, allowed: tuple[float, float]) -> list[float]:
    """Budgets for which a validation evaluates the routers' networks, as shares of the full model's cost.

    Args:
        wanted: budgets that the user gave; None: five, at 10, 30, 50, 70 and 90 % of the range `allowed`, to three decimals.
        cost: cost that the budgets limit.
        allowed: (lowest, highest) budget that the routers are trained for, as shares.

    Raises:
        FlextronError: for a budget below the smallest network's cost, or above 1.
    """
    least = max(allowed[0], cost.smallest / cost.full)
    if wanted is None:
        return [round(least + (allowed[1] - least) * part, 3) for part in (0.1, 0.3, 0.5, 0.7, 0.9)]
    for share in wanted:
        if not cost.smallest / cost.full <= share <= 1:
            raise FlextronError(
                f"validation_targets: {share} is not within {cost.smallest / cost.full:.3f} (the smallest network) and 1"
            )
    return list(wanted)


def _budget(learner: RouterLearner, target: float) -> dict[str, Any]:
    """Row of metrics.json on the network that the routers choose for a budget, the share `target` of the full model's cost.

    {"target", "share": cost of the network, "argmax_share": cost of the likeliest network, which may miss the budget (both as
    shares of the full model's), "subnetwork"}.
    """
    cost, net = learner.costs[0], learner.choose(target)
    return {
        "target": target,
        "share": cost.of(net) / cost.full,
        "argmax_share": cost.of(learner.argmax(target)) / cost.full,
        "subnetwork": net.to_dict(),
    }


def _range(targets: TargetSettings, cost: Cost) -> tuple[float, float]:
    """(lowest, highest) budget that routers are trained for, as shares of the full model's cost.

    Without targets.low the lowest is the cost of the smallest network. Raises FlextronError if it is no range within the costs of
    the smallest network and the full model.
    """
    least = cost.smallest / cost.full
    low = least if targets.low is None else float(targets.low)
    high = float(targets.high)
    if not least - 1e-9 <= low < high <= 1:
        raise FlextronError(
            f"targets.low={low:.4g} and targets.high={high:.4g} are no range within {least:.4f} "
            f"(the smallest network's {cost.name}) and 1: change them"
        )
    return low, high
