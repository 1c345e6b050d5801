"""`flextron compare`: selectors side by side, and random sub-networks of equal cost (Flextron, figures 5 and 13, Table 3)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.cost import Budget, Cost
from flextron_mcore.data.blend import valid_datasets
from flextron_mcore.evaluation.perplexity import evaluate, mean
from flextron_mcore.evaluation.scaling import fit
from flextron_mcore.model import loaded_model
from flextron_mcore.runs import choice
from flextron_mcore.runs.opened import opened, precision
from flextron_mcore.runs.output import discard, new_output, write_metrics
from flextron_mcore.runs.routers import validation_targets
from flextron_mcore.runs.terminal import print_table, progress_bar
from flextron_mcore.selection.sampling import draw_near
from flextron_mcore.selection.selectors import MatFormer, Uniform
from flextron_mcore.space import LayerChoice, SubNetwork, count_parameters
from flextron_mcore.training.checks import sequence_length


def run(config: DictConfig) -> dict[str, Any]:
    """Evaluate what every selector of config.selectors takes for every target, and what chance does."""
    info, data, computed, seq_length = opened(config)
    table = choice.latency_table(config, info)
    choice.check_table(table)
    costs = choice.known_costs(config, info, table)
    cost = costs.get(config.cost or ("latency" if table else "parameters"))
    if cost is None:
        raise FlextronError(f"cost={config.cost}: is not known here; known: {', '.join(costs)}")
    targets = validation_targets(config.targets, cost, (cost.smallest / cost.full, 1.0))
    blocks, full = Choices(info.model, info.space), SubNetwork.full(info.model)
    dense = [(Path(path).name, open_checkpoint(path)) for path in OmegaConf.to_container(config.dense)]
    near = {
        target: draw_near(blocks, [Budget(cost, target * cost.full)], config.random_at_target, config.seed)
        for target in (targets if config.random_at_target else ())
    }
    with new_output(config) as out:
        with progress_bar(desc="compare", unit="evaluation") as bar:
            losses = _Losses(config, valid_datasets(data, seq_length, config.seed, out / "cache"), seq_length, bar.update)
            losses.load(info, computed)
            losses.need([full, *(net for drawn in near.values() for net in drawn)])
            chosen = _chosen(config, info, cost, targets, losses)
            router = choice.selector(config, info, "router") if "router" in config.selectors else None
            equal = _equal(blocks, cost, config.selectors, router)
            losses.need([*(net for _, _, net in chosen), *(net for row in equal for net in row[1:] if net)])
            dense_rows = [_dense(name, each, cost, losses, data, config) for name, each in dense]
        discard(out / "cache")
        rows = [
            {"selector": name, "target": target, "subnetwork": net.to_dict(), **_sizes(net, cost), **losses.row(net)}
            for name, target, net in chosen
        ]
        figures = {
            "model": info.model.to_dict(),
            "space": info.space.to_dict(),
            "cost": cost.name,
            "full_cost": cost.full,
            "smallest_cost": cost.smallest,
            "machine": dict(table.machine) if table else None,
            "setting": dict(table.setting) if table else None,
            "samples": losses.samples,
            "full": {**_sizes(full, cost), **losses.row(full)},
            "networks": rows,
            "random": [_random(target, drawn, cost, losses, rows) for target, drawn in near.items()],
            "equal": [_equal_row(name, net, routed, cost, losses) for name, net, routed in equal],
            "dense": dense_rows,
            "scaling_law": _laws(config.selectors, rows, {**_sizes(full, cost), **losses.row(full)}),
        }
        metrics = write_metrics(out, "compare", figures)
    _print(figures)
    return metrics


class _Losses:
    """Validation losses of networks, each evaluated once."""

    def __init__(self, config: DictConfig, datasets: Any, seq_length: int, progress: Any) -> None:
        self.config, self.datasets, self.seq_length, self.progress = config, datasets, seq_length, progress
        self.found: dict[SubNetwork, dict[str, float]] = {}
        limit = config.limit_val_batches
        self.limit = limit and limit * config.model.micro_batch_size
        self.samples = sum(min(len(d), self.limit or len(d)) for d in datasets.values())

    def load(self, info: Any, precision: str) -> None:
        """Take the checkpoint's model."""
        self.model = loaded_model(self.config.model, info, precision)

    def need(self, networks: Sequence[SubNetwork]) -> None:
        """Evaluate those that are new."""
        new = {str(i): net for i, net in enumerate(dict.fromkeys(networks)) if net not in self.found}
        for name, domains in self.evaluate(self.model, new, self.seq_length).items():
            self.found[new[name]] = domains

    def evaluate(self, model: Any, networks: dict[str, Any], seq_length: int) -> dict[str, dict[str, float]]:
        """{name: {domain: loss}}."""
        size = self.config.model.micro_batch_size
        return evaluate(model, self.datasets, networks, seq_length, size, self.limit, lambda _: self.progress())

    def mean(self, net: SubNetwork) -> float:
        """Mean over domains [nats per token]."""
        self.need([net])
        return mean(self.found[net])

    def row(self, net: SubNetwork) -> dict[str, Any]:
        """As metrics.json has it."""
        average = self.mean(net)
        return {"loss": self.found[net], "mean_loss": average}


def _sizes(net: SubNetwork, cost: Cost) -> dict[str, Any]:
    return {
        "cost": cost.of(net),
        "share": cost.of(net) / cost.full,
        "parameters": count_parameters(cost.model, net),
        "non_embedding_parameters": count_parameters(cost.model, net, embeddings=False),
    }


def _chosen(
    config: DictConfig, info: Any, cost: Cost, targets: Sequence[float], losses: _Losses
) -> list[tuple[str, float, SubNetwork]]:
    """(selector, target, network), without those of a selector that has none for a target."""

    def evaluate(networks: Sequence[SubNetwork]) -> list[float]:
        losses.need(networks)
        return [losses.mean(net) for net in networks]

    chosen = []
    for name in config.selectors:
        picks = choice.selector(config, info, name, evaluate)
        for target in targets:
            try:
                chosen.append((name, target, picks.select([Budget(cost, target * cost.full)])))
            except FlextronError:
                if name not in ("uniform", "matformer"):  # which know few networks
                    raise
    return chosen


def _equal(blocks: Any, cost: Cost, names: Sequence[str], router: Any) -> list[tuple[str, SubNetwork, SubNetwork | None]]:
    """(selector, network, what the router takes for just that network's cost), of all that the simple selectors know."""
    known = {"uniform": Uniform(blocks).networks(), "matformer": MatFormer(blocks).networks()}
    pairs = [(name, net) for name in names for net in known.get(name, ())]
    return [(name, net, router.select([Budget(cost, cost.of(net))]) if router else None) for name, net in pairs]


def _equal_row(name: str, net: SubNetwork, routed: SubNetwork | None, cost: Cost, losses: _Losses) -> dict[str, Any]:
    return {
        "selector": name,
        "subnetwork": net.to_dict(),
        "share": cost.of(net) / cost.full,
        "mean_loss": losses.mean(net),
        "router_share": cost.of(routed) / cost.full if routed else None,
        "router_loss": losses.mean(routed) if routed else None,
    }


def _random(target: float, drawn: Sequence[SubNetwork], cost: Cost, losses: _Losses, rows: Sequence[Any]) -> dict[str, Any]:
    found = [losses.mean(net) for net in drawn]
    router = next((row for row in rows if (row["selector"], row["target"]) == ("router", target)), None)
    # Where networks are few, chance draws the router's own, too.
    others = [loss for net, loss in zip(drawn, found, strict=True) if router and net.to_dict() != router["subnetwork"]]
    return {
        "target": target,
        "shares": [cost.of(net) / cost.full for net in drawn],
        "mean_losses": found,
        "router_share": router and router["share"],
        "router_loss": router and router["mean_loss"],
        "better_than": sum(loss > router["mean_loss"] for loss in others) / len(others) if others else None,
    }


def _dense(name: str, info: Any, cost: Cost, losses: _Losses, data: Any, config: DictConfig) -> dict[str, Any]:
    """A dense model on the same data. Its cost is known where it has a shape of the family's space."""
    seq_length = sequence_length(config.model, info, data)
    found = losses.evaluate(loaded_model(config.model, info, precision(config, info)), {"dense": None}, seq_length)["dense"]
    arch = info.model
    choices = LayerChoice(True, arch.num_query_groups, arch.query_heads_per_group, arch.ffn_hidden_size)
    same = SubNetwork(arch.hidden_size, (choices,) * arch.num_layers)
    try:
        cost.space.check(cost.model, same)
        known = cost.of(same) if arch.kv_channels == cost.model.kv_channels else None
    except FlextronError:
        known = None
    return {
        "name": name,
        "parameters": count_parameters(arch),
        "non_embedding_parameters": count_parameters(arch, embeddings=False),
        "cost": known,
        "loss": found,
        "mean_loss": mean(found),
    }


def _laws(selectors: Sequence[str], rows: Sequence[Any], full: Any) -> list[dict[str, Any]]:
    """Eq. 12 fitted to each selector's networks and the full model, over parameters and over cost."""
    laws = []
    for name in selectors:
        points = [*(row for row in rows if row["selector"] == name), full]
        for of in ("non_embedding_parameters", "cost"):
            unique = {point[of]: point["mean_loss"] for point in points}
            laws.append({"selector": name, "of": of, "points": len(unique), **fit(list(unique), list(unique.values()))})
    return laws


def _print(figures: Any) -> None:
    name = figures["cost"]
    print_table(
        f"validation loss (nats per token, mean over domains) at shares of the full model's {name}",
        ["selector", "target", "share", "parameters", "loss"],
        [
            [row["selector"], f"{row['target']:g}", row["share"], row["parameters"], row["mean_loss"]]
            for row in figures["networks"]
        ]
        + [["full", "", 1.0, figures["full"]["parameters"], figures["full"]["mean_loss"]]],
    )
    if figures["random"]:
        print_table(
            "random sub-networks of the same cost",
            ["target", "networks", "best", "median", "router", "router is better than"],
            [
                [
                    f"{row['target']:g}",
                    len(row["mean_losses"]),
                    min(row["mean_losses"]),
                    sorted(row["mean_losses"])[len(row["mean_losses"]) // 2],
                    row["router_loss"] if row["router_loss"] is not None else "",
                    f"{100 * row['better_than']:.1f} %" if row["better_than"] is not None else "",
                ]
                for row in figures["random"]
            ],
        )
