"""Estimate of the floating-point operations and tokens of a stage. No torch import.

FLOPs are counted as in `flextron_mcore/flops.py`. Unlike there and in Megatron-LM, recomputation counts too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from flextron_mcore.axes import network_axes
from flextron_mcore.choices import Choices
from flextron_mcore.config import ModelConfig
from flextron_mcore.cost import OWN_UNITS
from flextron_mcore.evaluation.family import uniform_family
from flextron_mcore.flops import Costs
from flextron_mcore.launch.layout import LOOPED, Layout, teacher_of
from flextron_mcore.selection.selectors import MatFormer, Uniform
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.space import ElasticSpace, SubNetwork
from flextron_mcore.training.rampup import BatchSizes
from flextron_mcore.training.sampler import expected, mixture

# Exponent with which training/static.py draws budgets: their mean lies 1 / (1 + LARGE) of the range below its upper end.
LARGE = 2.0
_TARGETS = (0.1, 0.3, 0.5, 0.7, 0.9)  # default budgets of a validation (runs/routers.py), as shares of the range of budgets


@dataclass(frozen=True)
class Work:
    """Tokens and FLOPs of a stage.

    Attributes:
        tokens: of a training: tokens of all steps, without validation. Of `latency`: tokens of all timed forward passes. Of
            `importance`: calibration tokens. Of other stages: tokens of the validation data that it reads. Except for `latency`,
            a token counts once however many networks see it.
        flops: floating-point operations of all networks and all ranks together, validation and ablation included.
    """

    tokens: int
    flops: float


def work(
    model: ModelConfig, space: ElasticSpace, settings: StageSettings, layout: Layout, valid_samples: Sequence[int] | None
) -> Work:
    """Estimate the tokens and FLOPs of a stage. FLOPs are summed over all networks and ranks, validation included.

    Tokens of a training are the tokens of all steps, without validation; of `latency` the tokens of all timed forward passes; of
    other stages the tokens of the data that the stage reads. Except for `latency`, a token counts once however many networks see
    it.

    Args:
        model: architecture of the full model.
        space: elastic space.
        settings: settings of the stage.
        layout: layout of the stage over ranks.
        valid_samples: samples in each domain's validation split; None assumes one domain with as many samples as
            limit_val_batches reads.
    """
    costs = Costs(model, space, layout.length, layout.tensor)
    if settings.stage in LOOPED:
        return _training(costs, settings, layout, valid_samples)
    if settings.stage == "latency":
        return _latency(costs, settings)
    options = settings.model
    limit = settings.ablation_batches if settings.stage == "importance" else settings.limit_val_batches
    valid = costs.length * _valid(limit and limit * options.micro_batch_size, valid_samples)
    if settings.stage == "importance":
        return _importance(costs, settings, valid if limit else 0)
    each = {"evaluate": _evaluated, "sensitivity": _sensitivity, "compare": _compared, "family": _family}[settings.stage]
    return Work(valid, valid * each(costs, settings))


def _valid(limit: int | None, samples: Sequence[int] | None) -> int:
    """Validation samples of all domains together, at most `limit` of each (None: all).

    Args:
        limit: largest number of samples of a domain.
        samples: samples in each domain's validation split; None assumes one domain with `limit` samples, 0 without a limit.
    """
    if samples is None:
        return limit or 0
    return sum(min(n, limit) if limit else n for n in samples)


def _importance(costs: Costs, settings: StageSettings, valid: int) -> Work:
    """Work of `importance`: scores, layer scores, and the table of losses with and without sorting.

    Scores take a forward pass of the full model over the calibration samples. If depth is elastic, score.depth=mse takes a pass
    of the full model and one without each layer. The table evaluates the full model, and a network with about half of each
    elastic axis, unsorted and sorted, and these networks in random order too.

    Args:
        costs: FLOPs per token of the model's networks.
        settings: settings of the stage.
        valid: validation tokens of each evaluation of the table; 0 without the table.
    """
    model, space, tokens = costs.model, costs.space, settings.samples * costs.length
    flops = tokens * costs.full
    if len(space.depth) > 1 and settings.score.depth == "mse":
        without = costs.full - costs.layer(SubNetwork.full(model).layers[0])
        flops += min(settings.samples, settings.layer_samples) * costs.length * (costs.full + model.num_layers * without)
    halves = 0.0
    for axis in [*space.layer_axes, *(axis for axis in network_axes() if space.elastic(axis))]:
        sizes = space.sizes[axis.name]
        half = min(sizes, key=lambda size, full=sizes[-1]: abs(size - full / 2))
        halves += costs.of(space.uniform(model, **{axis.name: half}))
    return Work(tokens, flops + valid * (2 * costs.full + (3 if settings.ablation_random else 2) * halves))


def _training(costs: Costs, settings: StageSettings, layout: Layout, valid_samples: Sequence[int] | None) -> Work:
    """Work of a stage with a training loop: all steps with all their networks, a frozen teacher, and all validations.

    Args:
        costs: FLOPs per token of the model's networks.
        settings: settings of the stage.
        layout: layout of the stage over ranks.
        valid_samples: samples in each domain's validation split; None assumes one domain with as many samples as
            limit_val_batches reads.
    """
    stage, trainer, batch = settings.stage, settings.trainer, settings.model.global_batch_size
    low, high = _range(settings)
    if stage == "elastic":
        networks = [drawn(costs, settings.mode, settings.budget_weights)] * settings.num_subnetworks
        family = [costs.of(net) for net in uniform_family(costs.model, costs.space).values()]
        validated = [*family, *[costs.drawn(settings.mode)] * settings.validation_subnetworks]
    elif stage in ("router", "joint", "gumbel"):
        weighted = getattr(settings.router, "weighted_per_step", 0)  # weighted networks, computed at full size
        sliced = [costs.budgeted(low, high, 1 - 1 / (1 + LARGE))] * (settings.targets_per_step - weighted)
        networks = [costs.full] * weighted + sliced
        targets = settings.validation_targets
        shares = [costs.budgeted(low, high, part) for part in _TARGETS] if targets is None else [t * costs.full for t in targets]
        validated = [costs.full, *shares]
    else:
        networks, validated = [], [costs.full]
    if stage != "router":
        passes = [_trained(costs, net, layout) for net in (costs.full, *networks)]
    elif settings.surrogate.enabled:
        passes = [costs.full, *networks]
    else:  # gradients reach the gates through frozen weights, which get none themselves
        passes = [costs.full, *(_trained(costs, net, layout) - (net - _attention(costs, net)) for net in networks)]
    if teacher := teacher_of(settings, costs.model):
        passes.append(replace(costs, model=teacher).full)
    tokens = BatchSizes(settings.model, trainer.max_steps).start(trainer.max_steps) * costs.length
    limit = trainer.limit_val_batches
    every, steps = trainer.val_check_interval, trainer.max_steps
    validations = 1 + steps // every + (steps % every > 0)
    valid = validations * costs.length * _valid(limit and limit * batch, valid_samples)
    return Work(tokens, tokens * sum(passes) + valid * sum(validated))


def _range(settings: StageSettings) -> tuple[float | None, float]:
    """(low, high) of the budgets that routers train for; (None, 1.0) for `joint`, which takes them from its checkpoint."""
    targets = getattr(settings, "targets", None)
    return (targets.low, targets.high) if targets else (None, 1.0)


def _trained(costs: Costs, net: float, layout: Layout) -> float:
    """FLOPs per token of a forward and a backward pass, recomputation included.

    The hidden size of a sub-network is not known here: the output layer counts with the mean of the candidate hidden sizes.

    Args:
        costs: FLOPs per token of the model's networks.
        net: FLOPs per token of the network's forward pass.
        layout: layout of the stage, with its recomputation.
    """
    method, total = layout.recompute[0], costs.model.num_layers
    again = net - costs.head(None if net == costs.full else mean(costs.space.hidden_size))
    if method == "block":
        again *= recomputed_share(layout)
    elif method == "mlp":
        full = costs.full - costs.head()
        again *= total * 2.0 * costs.model.hidden_size * costs.model.ffn_hidden_size * (3 if costs.model.gated else 2) / full
    return 3 * net + (again if method else 0.0)


def recomputed_share(layout: Layout) -> float:
    """Share of all layers that the method "block" recomputes."""
    number = layout.recompute[1]
    return sum(layout.chunks * min(number, layers // layout.chunks) for layers in layout.layers) / sum(layout.layers)


def drawn(costs: Costs, mode: str, weights: Mapping[str, float] | None) -> float:
    """Expected FLOPs per token of a sub-network that `flextron elastic` draws.

    Args:
        costs: FLOPs per token of the model's networks.
        mode: value of `flextron elastic mode=`.
        weights: value of `flextron elastic budget_weights=`, {share of the full model's parameters: weight}; None: uniform draws.
    """
    if not weights:
        return costs.drawn(mode)
    of = mixture(costs.model, costs.space, weights)
    each = [
        sum(
            p * (costs.head(h) + depth * costs.layer(costs.space.layer_choice(costs.model, *sizes), h))
            for p, h, depth, sizes in expected(costs.space, candidates)
        )
        for candidates in of.candidates
    ]
    return sum(p * flops for p, flops in zip(of.probabilities, each, strict=True))


def _attention(costs: Costs, net: float) -> float:
    """FLOPs per token of attention scores and of their products with values in a network whose forward pass takes `net` FLOPs.

    An estimate: `net` times the share that these products have in the full model.
    """
    return net * costs.attention(SubNetwork.full(costs.model)) / costs.full


def _evaluated(costs: Costs, settings: StageSettings) -> float:
    """FLOPs per token of `evaluate`, the sum over its networks. A network that is not known yet counts as the full model."""
    given = settings.subnetwork
    if settings.budget is not None:
        found = [costs.full]  # an upper bound: the selector has not chosen the network yet
    elif given is None:
        found = [costs.of(net) for net in uniform_family(costs.model, costs.space).values()]
    else:
        files = [Path(given)] if isinstance(given, str) else map(Path, given)
        found = [costs.of(SubNetwork.from_file(file)) if file.is_file() else costs.full for file in files]
    return sum(found) + settings.random * costs.drawn()


def _family(costs: Costs, settings: StageSettings) -> float:
    """FLOPs per token of `family`, the sum over its budgets.

    A budget that is a share counts as that share of the full model's FLOPs, any other as all of them, which is an upper bound.
    """
    words = [str(budget).split() for budget in settings.budgets]
    shares = [word[0] for word in words if len(word) == 1 or word[1] in OWN_UNITS]
    known = [float(share) for share in shares if re.fullmatch(r"0?\.\d+", share)]
    return costs.full * (sum(known) + len(words) - len(known))


def _sensitivity(costs: Costs, settings: StageSettings) -> float:
    """FLOPs per token of `sensitivity`: the full model, and the full model with each smaller candidate of each block."""
    choices, full = Choices(costs.model, costs.space), SubNetwork.full(costs.model)
    of_layer = range(len(costs.space.layer_axes))  # decisions of the first layer; other layers cost the same
    smaller = [(block, k) for block in of_layer for k in range(len(choices.sizes[block]) - 1)]
    return costs.full + costs.model.num_layers * sum(costs.of(choices.replaced(full, *place)) for place in smaller)


def _compared(costs: Costs, settings: StageSettings) -> float:
    """FLOPs per token of `compare`, the sum over the networks that it evaluates.

    These are the full model; for each target one network of each selector, and random networks; and every network of the
    selectors `uniform` and `matformer`, each with the router's network of equal cost. A network that two selectors choose counts
    twice. Dense models trained elsewhere, which `compare` may be given, do not count.
    """
    names, choices = list(settings.selectors), Choices(costs.model, costs.space)
    targets = [costs.budgeted(None, 1.0, part) for part in _TARGETS]
    if settings.targets is not None:
        targets = [share * costs.full for share in settings.targets]
    each = settings.random_at_target + len(names) + ("random" in names) * settings.random_networks
    known = {"uniform": Uniform(choices).networks(), "matformer": MatFormer(choices).networks()}
    equal = sum(costs.of(net) for name in names for net in known.get(name, ())) * (2 if "router" in names else 1)
    return costs.full + each * sum(targets) + equal


def _latency(costs: Costs, settings: StageSettings) -> Work:
    """Work of `latency`, which is one process; zero if the table is fitted to measurements made elsewhere."""
    setting = settings.setting
    if settings.measurements is not None:
        return Work(0, 0.0)
    generated = setting.generated_tokens - 1 if setting.kind == "generation" else 0
    space = costs.space
    balanced = len(space.hidden_size) * max(len(space.sizes[axis.name]) for axis in space.layer_axes)
    each = (settings.rounds + 1) * setting.batch_size * (costs.length + generated)  # tokens of a network
    all_layers = replace(space, sizes={**space.sizes, "depth": space.depth[-1:]})
    whole = Costs(costs.model, all_layers, costs.length, costs.tensor).drawn()
    return Work(each * (balanced + settings.check_networks), each * (balanced * whole + settings.check_networks * costs.drawn()))
