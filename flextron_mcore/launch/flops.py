"""Floating-point operations and tokens of a stage. No torch import.

Counted as Megatron-LM's `num_floating_point_operations` does: matrix products only, 2 m n k each; of causal attention the half
that is not masked; the vocabulary with its padding; a backward pass costs two forward passes. Unlike there, recomputation counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from flextron_mcore.blocks import Blocks
from flextron_mcore.config import ModelConfig
from flextron_mcore.evaluation.family import uniform_family
from flextron_mcore.launch.layout import LOOPED, Layout
from flextron_mcore.selection.selectors import MatFormer, Uniform
from flextron_mcore.space import ElasticSpace, LayerChoice, SubNetwork

LARGE = 2.0  # as in training/router.py, which draws budgets whose mean is 1 / (1 + LARGE) of their range below its top
_TARGETS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of stages/router.py: shares of that range to validate at


@dataclass(frozen=True)
class Costs:
    """FLOPs of a forward pass, per token of sequences of `length`. tensor: ranks that share the vocabulary."""

    model: ModelConfig
    space: ElasticSpace
    length: int
    tensor: int = 1

    def layer(self, choice: LayerChoice) -> float:
        """Of a layer."""
        h, head = self.model.hidden_size, self.model.kv_channels
        q, kv = choice.num_attention_heads * head, choice.kv_groups * head
        products = h * (2 * q + 2 * kv) + h * choice.ffn_hidden_size * (3 if self.model.gated else 2)
        return 2.0 * products + 2.0 * self.length * q

    @property
    def head(self) -> float:
        """Of the output layer."""
        return 2.0 * self.model.hidden_size * (-(-self.model.vocab_size // self.tensor) * self.tensor)

    def of(self, net: SubNetwork) -> float:
        """Of a network."""
        return self.head + sum(self.layer(layer) for layer in net.layers)

    @property
    def full(self) -> float:
        """Of the full model."""
        return self.of(SubNetwork.full(self.model))

    @property
    def smallest(self) -> float:
        """Of the smallest network."""
        return self.of(self.space.uniform(self.model, self.space.heads[0], self.space.ffn_hidden_size[0]))

    def drawn(self, mode: str = "flextron") -> float:
        """Expected, of a random network (training/sampler.py)."""
        heads, widths = self.space.heads, self.space.ffn_hidden_size
        if mode == "matformer":
            heads, widths = (self.model.num_attention_heads,), widths[:-1] or widths
        layers = [self.layer(self.space.layer_choice(self.model, a, m)) for a in heads for m in widths]
        return self.head + self.model.num_layers * mean(layers)

    def budgeted(self, low: float | None, high: float, part: float) -> float:
        """Of a network for a budget, `part` of the way from `low` to `high`, shares of the full model's cost."""
        bottom = self.smallest if low is None else low * self.full
        return bottom + part * (high * self.full - bottom)


@dataclass(frozen=True)
class Work:
    """What a stage reads and computes."""

    tokens: int
    flops: float


def work(
    model: ModelConfig, space: ElasticSpace, config: Mapping[str, Any], layout: Layout, valid_samples: Sequence[int] | None
) -> Work:
    """Of the stage of `config`; valid_samples as in `estimate`."""
    costs = Costs(model, space, layout.length, layout.tensor)
    if config["stage"] in LOOPED:
        return _training(costs, config, layout, valid_samples)
    if config["stage"] == "latency":
        return _latency(costs, config)
    options = config["model"]
    limit = config["ablation_batches" if config["stage"] == "importance" else "limit_val_batches"]
    valid = costs.length * _valid(limit and limit * options["micro_batch_size"], valid_samples)
    if config["stage"] == "importance":
        tokens = config["samples"] * costs.length
        half = [
            min(sizes, key=lambda size, full=sizes[-1]: abs(size - full / 2)) for sizes in (space.heads, space.ffn_hidden_size)
        ]
        table = [(space.heads[-1], space.ffn_hidden_size[-1]), (half[0], space.ffn_hidden_size[-1]), (space.heads[-1], half[1])]
        tested = 2 * sum(costs.of(space.uniform(model, *sizes)) for sizes in table) if limit else 0.0  # unsorted, sorted
        return Work(tokens, tokens * costs.full + valid * tested)
    return Work(
        valid, valid * {"evaluate": _evaluated, "sensitivity": _sensitivity, "compare": _compared}[config["stage"]](costs, config)
    )


def _valid(limit: int | None, samples: Sequence[int] | None) -> int:
    """Validation samples of all domains, of each at most `limit` (None: all)."""
    if samples is None:
        return limit or 0
    return sum(min(n, limit) if limit else n for n in samples)


def _training(costs: Costs, config: Mapping[str, Any], layout: Layout, valid_samples: Sequence[int] | None) -> Work:
    stage, trainer, batch = config["stage"], config["trainer"], config["model"]["global_batch_size"]
    low, high = _range(config)
    if stage == "elastic":
        networks = [costs.drawn(config["mode"])] * config["num_subnetworks"]
        family = [costs.of(net) for net in uniform_family(costs.model, costs.space).values()]
        validated = [*family, *[costs.drawn(config["mode"])] * config["validation_subnetworks"]]
    elif stage in ("router", "joint"):
        networks = [costs.budgeted(low, high, 1 - 1 / (1 + LARGE))] * config["targets_per_step"]
        targets = config["validation_targets"]
        shares = [costs.budgeted(low, high, part) for part in _TARGETS] if targets is None else [t * costs.full for t in targets]
        validated = [costs.full, *shares]
    else:
        networks, validated = [], [costs.full]
    if stage != "router":
        passes = [_trained(costs, net, layout) for net in (costs.full, *networks)]
    elif config["surrogate"]["enabled"]:
        passes = [costs.full, *networks]
    else:  # through frozen weights to the gates: no gradients of weights
        passes = [costs.full, *(_trained(costs, net, layout) - (net - _attention(costs, net)) for net in networks)]
    tokens = trainer["max_steps"] * batch * costs.length
    limit = trainer["limit_val_batches"]
    every, steps = trainer["val_check_interval"], trainer["max_steps"]
    validations = 1 + steps // every + (steps % every > 0)
    valid = validations * costs.length * _valid(limit and limit * batch, valid_samples)
    return Work(tokens, tokens * sum(passes) + valid * sum(validated))


def _range(config: Mapping[str, Any]) -> tuple[float | None, float]:
    """Of the budgets that routers are trained for; joint has those of the routers, which are not known before."""
    targets = config.get("targets") or {}
    return targets.get("low"), targets.get("high", 1.0)


def _trained(costs: Costs, net: float, layout: Layout) -> float:
    """Forward and backward pass of a network whose forward pass costs `net`, with what is computed again."""
    (method, number), total = layout.recompute, costs.model.num_layers
    again = net - costs.head
    if method == "block":
        again *= min(sum(layout.chunks * min(number, layers // layout.chunks) for layers in layout.layers) / total, 1.0)
    elif method == "mlp":
        full = costs.full - costs.head
        again *= total * 2.0 * costs.model.hidden_size * costs.model.ffn_hidden_size * (3 if costs.model.gated else 2) / full
    return 3 * net + (again if method else 0.0)


def _attention(costs: Costs, net: float) -> float:
    """The share of a network's cost that has no weights: scores and their products with values, as in the full model."""
    without = 2.0 * costs.length * costs.model.num_attention_heads * costs.model.kv_channels * costs.model.num_layers
    return net * without / costs.full


def _evaluated(costs: Costs, config: Mapping[str, Any]) -> float:
    given = config["subnetwork"]
    if config["budget"] is not None:
        found = [costs.full]  # at most
    elif given is None:
        found = [costs.of(net) for net in uniform_family(costs.model, costs.space).values()]
    else:
        files = [Path(given)] if isinstance(given, str) else map(Path, given)
        found = [costs.of(SubNetwork.from_file(file)) if file.is_file() else costs.full for file in files]
    return sum(found) + config["random"] * costs.drawn()


def _sensitivity(costs: Costs, config: Mapping[str, Any]) -> float:
    """The full model, and it with every smaller candidate of every block."""
    blocks, full = Blocks(costs.model, costs.space), SubNetwork.full(costs.model)
    smaller = [(block, k) for block in (0, 1) for k in range(len(blocks.sizes[block]) - 1)]  # all layers are alike
    return costs.full + costs.model.num_layers * sum(costs.of(blocks.replaced(full, *place)) for place in smaller)


def _compared(costs: Costs, config: Mapping[str, Any]) -> float:
    """Networks that two selectors share are counted twice; config.dense not at all."""
    names, blocks = list(config["selectors"]), Blocks(costs.model, costs.space)
    targets = [costs.budgeted(None, 1.0, part) for part in _TARGETS]
    if config["targets"] is not None:
        targets = [share * costs.full for share in config["targets"]]
    each = config["random_at_target"] + len(names) + ("random" in names) * config["random_networks"]
    known = {"uniform": Uniform(blocks).networks(), "matformer": MatFormer(blocks).networks()}
    equal = sum(costs.of(net) for name in names for net in known.get(name, ())) * (2 if "router" in names else 1)
    return costs.full + each * sum(targets) + equal


def _latency(costs: Costs, config: Mapping[str, Any]) -> Work:
    """One process, whatever the number of ranks; nothing where the table is fitted to measurements made elsewhere."""
    setting = config["setting"]
    if config["measurements"] is not None:
        return Work(0, 0.0)
    generated = setting["generated_tokens"] - 1 if setting["kind"] == "generation" else 0
    passes = (config["rounds"] + 1) * (max(len(costs.space.heads), len(costs.space.ffn_hidden_size)) + config["check_networks"])
    tokens = passes * setting["batch_size"] * (costs.length + generated)
    return Work(tokens, tokens * costs.drawn())
