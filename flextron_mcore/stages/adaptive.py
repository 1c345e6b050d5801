"""Adaptive routers for `flextron router kind=adaptive`: training, calibration, and what they do on validation data."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from flextron_mcore.adaptive.cost import RoutingCost
from flextron_mcore.config import FlextronError
from flextron_mcore.runs.choice import check_table, counted_cost, known_costs, latency_table
from flextron_mcore.runs.opened import check_not_modulated
from flextron_mcore.runs.output import discard, new_output, write_metrics
from flextron_mcore.runs.resume import resumable_output
from flextron_mcore.runs.terminal import print_table, progress_bar, say

if TYPE_CHECKING:
    from flextron_mcore.adaptive.evaluation import Routed
    from flextron_mcore.adaptive.learner import AdaptiveLearner

MOST_HIDDEN = 128
_SHOWN = 128  # tokens of a text whose cost is told


def train_adaptive(config: DictConfig, info: Any, data: Any) -> dict[str, Any]:
    """Train, calibrate, evaluate beside the static routers' choices, and write metrics.json."""
    from flextron_mcore.checkpoint.store import list_checkpoints, open_checkpoint
    from flextron_mcore.model import loaded_model
    from flextron_mcore.runs.routers import validation_targets
    from flextron_mcore.training.checks import check
    from flextron_mcore.training.loop import Phase, train

    check_not_modulated(info)
    learner = _learner(config, info)
    cost = learner.costs[0]
    targets = validation_targets(config.validation_targets, cost, learner.info.ranges[0])
    seq_length = check(config, info, data, 1 + config.targets_per_step)
    with resumable_output(config, info, data) as out:
        measured = _Measured(config, out, data, learner, seq_length)
        phase = Phase(
            networks=lambda step: [None, *learner.networks(step)],
            validation=lambda step: {"full": None, **{f"adaptive {share:g}": learner.routing(share) for share in targets}},
            learner=learner,
            frozen=config.stage == "router",
            after={config.trainer.max_steps: measured.calibrate},
        )
        figures = train(config, out, info, data, phase, seq_length)
        trained = open_checkpoint(list_checkpoints(out)[-1])
        model = loaded_model(config.model, trained, config.trainer.precision)
        rows = measured.budgets(model, targets)
        more = {
            "full_loss": measured.full_loss(model),
            "token_costs": measured.tokens(model, rows[len(rows) // 2]["target"], data),
        }
        discard(out / "cache")
        kinds = ["static", *rows[0]["adaptive"]]
        print_table(
            f"validation loss (nats per token), and the average share of the full model's {cost.name} that was spent",
            ["budget", *(text for kind in kinds for text in (kind, "share")), "better by"],
            [
                [f"{row['target']:g}", *_pair(row["static"])]
                + [value for kind in kinds[1:] for value in _pair(row["adaptive"][kind])]
                + [_better(row, learner)]
                for row in rows
            ],
        )
        counted = isinstance(learner.counted[learner.info.kv_policy][0], RoutingCost)
        if counted and all(_better(row, learner) < 0 for row in rows):
            say(f"{config.stage}: at these budgets routing costs more than it saves: the static choice serves them better")
        return write_metrics(
            out,
            config.stage,
            {
                **figures,
                "routers": {"kind": "adaptive", "costs": list(learner.info.costs), "kv_policy": learner.info.kv_policy},
                "calibration": learner.info.calibration,
                "adaptive_budgets": rows,
                **more,
            },
        )


def _better(row: dict[str, Any], learner: AdaptiveLearner) -> float:
    return row["static"]["mean_loss"] - row["adaptive"][learner.info.kv_policy]["mean_loss"]


def _pair(row: dict[str, Any]) -> tuple[float, float]:
    return row["mean_loss"], row["share"]


def _learner(config: DictConfig, info: Any) -> AdaptiveLearner:
    """New routers that start from the static ones of the checkpoint, or with `joint` its adaptive ones.

    Raises FlextronError for settings that cannot be.
    """
    import torch

    from flextron_mcore.adaptive.learner import AdaptiveLearner, AdaptiveSettings
    from flextron_mcore.adaptive.routers import AdaptiveRouters
    from flextron_mcore.adaptive.surrogate import SurrogateSettings
    from flextron_mcore.choices import Choices
    from flextron_mcore.layers.dispatch import KV_POLICIES
    from flextron_mcore.routers.store import read_routers
    from flextron_mcore.runtime.distributed import device

    joint = config.stage == "joint"
    values = OmegaConf.to_container(config.adaptive)
    hidden_size = 1 if joint else values.pop("hidden_size")
    surrogate = None
    if values.pop("surrogate", False):
        given = OmegaConf.to_container(config.surrogate)
        surrogate = SurrogateSettings(**{name: given[name] for name in SurrogateSettings.__dataclass_fields__})
    if not joint and config.kv_policy not in KV_POLICIES:
        raise FlextronError(f"kv_policy={config.kv_policy!r} is not known: use one of {', '.join(KV_POLICIES)}")
    if not 1 <= hidden_size <= MOST_HIDDEN:
        raise FlextronError(f"adaptive.hidden_size={hidden_size} is not within 1..{MOST_HIDDEN}")
    if values.pop("calibration_samples") < 1 or config.targets_per_step < 1:
        raise FlextronError("adaptive.calibration_samples and targets_per_step must be at least 1")
    blocks = Choices(info.model, info.space)
    described, found = read_routers(info.path, blocks, "adaptive" if joint else "static")
    table = latency_table(config, info)
    check_table(table)
    known = known_costs(config, info, table)
    if missing := [name for name in described.costs if name not in known]:
        raise FlextronError(f"checkpoint={info.path}: its routers were trained for {missing[0]}: give {missing[0]}=, its table")
    told, routers = replace(described, evaluated=()), found  # which will be another model's
    if not joint:
        told = replace(described, hidden_size=hidden_size, kind="adaptive", kv_policy=config.kv_policy)
        if table and (routed := table.routed.get(config.kv_policy)) and routed.hidden_size != hidden_size:
            say(
                f"router: warning: the latency table counts routers with {routed.hidden_size} hidden units, "
                f"not adaptive.hidden_size={hidden_size}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            routers = AdaptiveRouters(blocks, len(described.costs), hidden_size, found)
    return AdaptiveLearner(
        blocks,
        [known[name] for name in described.costs],
        told,
        AdaptiveSettings(targets_per_step=config.targets_per_step, **values),
        config.seed,
        config.trainer.max_steps,
        routers.to(device()),
        config.model.sequence_parallel,
        {
            policy: [counted_cost(known[name], table, policy, quiet=policy != told.kv_policy) for name in described.costs]
            for policy in KV_POLICIES
        },
        table.to_dict() if table else None,
        surrogate,
    )


class _Measured:
    """The trained routers on training data (calibration) and on validation data."""

    def __init__(self, config: DictConfig, out: Any, data: Any, learner: AdaptiveLearner, seq_length: int) -> None:
        from flextron_mcore.data.blend import train_dataset, valid_datasets

        self.config, self.out, self.learner, self.seq_length = config, out, learner, seq_length
        samples = config.adaptive.calibration_samples
        self.calibration = {"train": train_dataset(data, seq_length, samples, config.seed, out / "cache", config.data_weights)}
        self.valid = valid_datasets(data, seq_length, config.seed, out / "cache")
        limit = config.trainer.limit_val_batches
        self.samples = limit and limit * config.model.global_batch_size

    def _run(self, model: Any, datasets: Any, target: float, kv_policy: str | None, samples: int | None) -> dict[str, Routed]:
        from flextron_mcore.adaptive.evaluation import evaluate_routed

        size = self.config.model.micro_batch_size
        make = lambda: self.learner.at_target(target, kv_policy)  # noqa: E731
        return evaluate_routed(model, datasets, make, self.seq_length, size, samples)

    def calibrate(self, model: list[Any]) -> None:
        """How much the routers spend for which target, into the learner's `info`."""
        from flextron_mcore.adaptive.evaluation import calibrate

        learner, samples = self.learner, self.config.adaptive.calibration_samples

        def spent(target: float) -> float:
            (routed,) = self._run(model, self.calibration, target, None, samples).values()
            return learner.share(routed.share_NK)

        with progress_bar(desc="calibration", unit="target") as bar:
            learner.info = replace(learner.info, calibration=tuple(calibrate(spent, bar.update)))

    def budgets(self, model: Any, targets: list[float]) -> list[dict[str, Any]]:
        """For each budget: the static choice, and the adaptive ones with both KV policies, a domain."""
        from flextron_mcore.adaptive.evaluation import target_for
        from flextron_mcore.evaluation.perplexity import evaluate
        from flextron_mcore.layers.dispatch import KV_POLICIES

        learner, cost = self.learner, self.learner.costs[0]
        size = self.config.model.micro_batch_size
        policies = [learner.info.kv_policy]
        if learner.blocks.space.attention_unit == "kv_group":  # with query heads as units they are the same
            policies = list(KV_POLICIES)
        rows = []
        low, high = (pick(share for _, share in learner.info.calibration) for pick in (min, max))
        if low > min(targets) + 0.005 or high < max(targets) - 0.005:
            say(f"{self.config.stage}: warning: tokens' choices cost {low:.3f} to {high:.3f}; other budgets get what is nearest")
        with progress_bar(total=len(targets), desc="budgets", unit="budget") as bar:
            for share in targets:
                net = self._static(share)
                losses = evaluate(model, self.valid, {"": net}, self.seq_length, size, self.samples)[""]
                static = {
                    "loss": losses,
                    "mean_loss": _mean(losses),
                    "share": cost.of(net) / cost.full,
                    "subnetwork": net.to_dict(),
                }
                row: dict[str, Any] = {"target": share, "static": static, "adaptive": {}}
                asked = target_for(learner.info.calibration, share, nearest=True)
                for policy in policies:
                    row["adaptive"][policy] = self._row(self._run(model, self.valid, asked, policy, self.samples), policy)
                rows.append(row)
                bar.update()
        return rows

    def full_loss(self, model: Any) -> dict[str, float]:
        """The full model's loss a domain."""
        from flextron_mcore.evaluation.perplexity import evaluate

        size = self.config.model.micro_batch_size
        return evaluate(model, self.valid, {"": None}, self.seq_length, size, self.samples)[""]

    def tokens(self, model: Any, share: float, data: Any) -> list[dict[str, Any]]:
        """For each domain the first tokens of a text, and what each was worth: its cost as a share of the full model's."""
        from flextron_mcore.adaptive.evaluation import each_cost, each_token, target_for
        from flextron_mcore.data.blend import batch
        from flextron_mcore.data.tokenizer import open_tokenizer

        learner = self.learner
        tokenizer, cost = open_tokenizer(data.tokenizer), learner.costs[0]
        mix = learner.counted[learner.info.kv_policy][0]
        target = target_for(learner.info.calibration, share, nearest=True)
        found = []
        for domain, dataset in self.valid.items():
            ids = batch(dataset, [0])["tokens"]
            levels_NS = each_token(model, learner.at_target(target), ids)[:, :_SHOWN]
            spent = (each_cost(mix, learner.blocks, levels_NS) / cost.full).tolist()
            texts = [tokenizer.decode([i]) for i in ids[0, : len(spent)].tolist()]
            found.append({"domain": domain, "budget": share, "texts": texts, "shares": spent})
        return found

    def _row(self, found: dict[str, Routed], kv_policy: str) -> dict[str, Any]:
        shares = {domain: self.learner.share(routed.share_NK, kv_policy) for domain, routed in found.items()}
        losses = {domain: routed.loss for domain, routed in found.items()}
        levels = _levels(self.learner.blocks, found)
        return {"loss": losses, "mean_loss": _mean(losses), "shares": shares, "share": _mean(shares), "levels": levels}

    def _static(self, share: float) -> Any:
        from flextron_mcore.cost import Budget
        from flextron_mcore.routers.static import log_probabilities
        from flextron_mcore.selection.router import RouterSelector as Selected

        learner, cost = self.learner, self.learner.costs[0]
        static = learner.routers.static
        device = static.shift_NU.device
        costs, losses = {c.name: c for c in learner.costs}, learner.info.losses(learner.blocks)
        picks = Selected(learner.blocks, costs, log_probabilities(static.cpu()), evaluated=losses)
        net = picks.select([Budget(cost, share * cost.full)])
        static.to(device)
        return net


def evaluate_adaptive(config: DictConfig, info: Any, data: Any, computed: str, seq_length: int) -> dict[str, Any]:
    """`flextron evaluate selector=adaptive budget=...`: loss, perplexity and what was spent, a domain."""
    from flextron_mcore.adaptive.evaluation import average, evaluate_routed
    from flextron_mcore.choices import Choices
    from flextron_mcore.data.blend import valid_datasets
    from flextron_mcore.evaluation.perplexity import perplexity
    from flextron_mcore.model import loaded_model
    from flextron_mcore.runs.choice import adaptive_routing, counted_cost

    make, cost, share = adaptive_routing(config, info)
    mix = counted_cost(cost, latency_table(config, info), make().kv_policy)
    blocks, size = Choices(info.model, info.space), config.model.micro_batch_size
    with new_output(config) as out:
        datasets = valid_datasets(data, seq_length, config.seed, out / "cache")
        model = loaded_model(config.model, info, computed)
        samples = config.limit_val_batches and config.limit_val_batches * size
        with progress_bar(total=len(datasets), desc="evaluate") as bar:
            found = evaluate_routed(model, datasets, make, seq_length, size, samples, lambda done: bar.update())
        discard(out / "cache")
        losses = {domain: routed.loss for domain, routed in found.items()}
        shares = {domain: average(mix, blocks, routed.share_NK) / cost.full for domain, routed in found.items()}
        metrics = write_metrics(
            out,
            "evaluate",
            {
                "loss": losses,
                "perplexity": {domain: perplexity(loss) for domain, loss in losses.items()},
                "mean": {"loss": _mean(losses), "perplexity": perplexity(_mean(losses))},
                "cost": cost.name,
                "full_cost": cost.full,
                "budget": share,
                "kv_policy": make().kv_policy,
                "shares": shares,
                "share": _mean(shares),
                "levels": _levels(blocks, found),
                "dtype": config.trainer.precision or info.dtype,
                "model": info.model.to_dict(),
                "space": info.space.to_dict(),
            },
        )
    print_table(
        f"validation loss (nats per token) and the average share of the full model's {cost.name}, at a budget of {share:.3f}",
        ["", *datasets, "mean"],
        [["loss", *losses.values(), _mean(losses)], ["share", *shares.values(), _mean(shares)]],
    )
    return metrics


def _levels(blocks: Any, found: dict[str, Routed]) -> dict[str, list[list[float]]]:
    """For each domain, for each block, the share of tokens at each of its levels."""
    return {
        domain: [shares[: len(sizes)].tolist() for shares, sizes in zip(routed.share_NK, blocks.sizes, strict=True)]
        for domain, routed in found.items()
    }


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)
