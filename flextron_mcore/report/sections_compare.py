"""The sections about `compare` and `sensitivity`.

Losses are in nats per token, targets and shares in fractions of the full model's cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from flextron_mcore.config import ModelConfig
from flextron_mcore.report import figures_compare as figures
from flextron_mcore.report.collect_compare import AXES, SELECTORS, Comparison, Fit, RandomNetworks, Sensitivity
from flextron_mcore.report.parts import Section, Table, cost_unit, loss, percent, signed, significant
from flextron_mcore.space import SubNetwork

UNDETERMINED = "not determined"


def comparison_sections(comparisons: Sequence[Comparison]) -> list[Section]:
    """Up to four parts of the page for each `compare` directory: loss against cost, fits, random networks, equal cost."""
    parts = []
    for i, c in enumerate(comparisons, start=1):
        number, label = (str(i) if i > 1 else "", f" ({c.label})" if len(comparisons) > 1 else "")
        parts.append(_loss_section(c, f"compare{number}", label))
        if c.fits:
            parts.append(_fits_section(c, f"scaling{number}", label))
        if c.random:
            parts.append(_random_section(c, f"random{number}", label))
        if c.equal:
            parts.append(_equal_section(c, f"equal{number}", label))
    return parts


def comparison_sentence(c: Comparison) -> str | None:
    """What the routers reach at the smallest budget, for the summary; None without routers."""
    routed = [net for net in c.of("router") if net.target is not None]
    if not routed:
        return None
    net = min(routed, key=lambda net: net.target)
    text = f"Asked for {100 * net.target:.4g}% of the full model’s {c.cost}, the routers choose a network with a mean loss of"
    text += f" {loss(net.mean_loss)}, against {loss(c.full.mean_loss)} of the full model"
    row = next((row for row in c.random if row.target == net.target and row.better_than is not None), None)
    return text + (f" and better than {percent(row.better_than)} of random networks of that budget." if row else ".")


def sensitivity_sections(sensitivities: Sequence[Sensitivity]) -> list[Section]:
    """A part of the page for each `sensitivity` directory."""
    parts = []
    for i, s in enumerate(sensitivities, start=1):
        columns = [(axis, size) for axis in AXES for size in s.candidates(axis)]
        curves = [dict(s.curve(axis, size)) for axis, size in columns]
        share = lambda axis, size: f"{100 * size / s.full_size(axis):.0f}%"  # noqa: E731, B023
        head = ["Layer", *(f"{'Heads' if axis == 'heads' else 'FFN'} {size:,} ({share(axis, size)})" for axis, size in columns)]
        difference = lambda value: "–" if value is None else signed(value)  # noqa: E731
        rows = [[str(layer + 1), *(difference(curve.get(layer)) for curve in curves)] for layer in range(s.model.num_layers)]
        rows.append(["mean", *(difference(sum(curve.values()) / len(curve)) for curve in curves)])
        note = f"Loss above the full model’s ({loss(s.full_loss)} nats per token, {s.samples:,} samples) when one block alone is"
        note += " replaced by a candidate."
        label = f" ({s.label})" if len(sensitivities) > 1 else ""
        table = Table(head, rows, strong=len(rows) - 1)
        title = f"Sensitivity of every block{label}"
        parts.append(Section(f"sensitivity{i if i > 1 else ''}", title, note, [table], [figures.degradation(s)]))
    return parts


def _loss_section(c: Comparison, key: str, label: str) -> Section:
    name, unit = cost_unit(c.cost, c.full_cost)
    nets = [c.full, *(net for selector in SELECTORS for net in c.of(selector)[::-1]), *c.dense]
    domains = list(dict.fromkeys(domain for net in nets for domain in net.loss))
    digits = 3 if c.cost == "latency" and c.full_cost < 100 else 1
    columns = [
        ("Selector", [net.name if net.selector != "dense" else f"dense: {net.name}" for net in nets]),
        ("Target", [_share(net.target) for net in nets]),
        ("Share", [_share(net.share) for net in nets]),
    ]
    if c.cost != "parameters":
        columns.append((name, ["–" if net.cost is None else f"{net.cost / unit:,.{digits}f}" for net in nets]))
    columns += [
        ("Parameters", [f"{net.parameters:,}" for net in nets]),
        ("Non-embedding parameters", [f"{net.non_embedding_parameters:,}" for net in nets]),
        ("Mean loss", [loss(net.mean_loss) for net in nets]),
        *((f"Loss, {domain}", [loss(net.loss.get(domain)) for net in nets]) for domain in domains),
    ]
    rows = [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
    note = f"Networks that each selector chooses for a budget, evaluated on {c.samples:,} samples; target and share are fractions"
    note += f" of the full model’s {c.cost}, the smallest network has {percent(c.smallest_cost / c.full_cost)}.{_measured(c)}"
    pictures = [figures.loss_against(c, by) for by in ("cost", "non_embedding_parameters")]
    return Section(key, f"Loss against {c.cost}{label}", note, [Table([h for h, _ in columns], rows, strong=0)], pictures)


def _measured(c: Comparison) -> str:
    """Where a latency was measured, as a sentence after a space; empty for another cost."""
    if c.cost != "latency":
        return ""
    parts = [str(c.machine[key]) for key in ("device", "dtype") if c.machine.get(key) is not None]
    setting = {key: value for key, value in c.setting.items() if isinstance(value, str | int | float)}
    parts += [str(value) if key == "kind" else f"{key.replace('_', ' ')} {value}" for key, value in setting.items()]
    return f" Measured on {', '.join(parts)}." if parts else ""


def _fits_section(c: Comparison, key: str, label: str) -> Section:
    head = ["Selector", "N", "Networks", "Nc", "α", "E"]
    unit = {"latency": "latency (ms)", "parameters": "parameters", "memory": "memory (bytes)"}[c.cost]
    names = {"cost": unit, "non_embedding_parameters": "non-embedding parameters"}
    rows = [[fit.selector, names[fit.of], f"{fit.points:,}", *_fitted(fit)] for fit in c.fits]
    note = "L(N) = (N / Nc)^−α + E (the paper’s eq. 12 and Table 3), fitted to the networks of a selector and the full model; in"
    note += " brackets 95% confidence intervals. Networks that are too few or too much alike do not determine a fit."
    return Section(key, f"Scaling law{label}", note, [Table(head, rows, left=2)], [])


def _fitted(fit: Fit) -> list[str]:
    if fit.values is None:
        return [UNDETERMINED] * 3
    cells = []
    for value, interval in zip(fit.values, fit.intervals, strict=True):
        text = significant(value)
        cells.append(f"{text} ({significant(interval[0])} to {significant(interval[1])})" if interval else text)
    return cells


def _random_section(c: Comparison, key: str, label: str) -> Section:
    head = ["Budget", "Networks", "Best", "Median", "Worst", "Router", "Router’s share", "Better than"]
    rows = []
    for row in sorted(c.random, key=lambda row: -row.target):
        router = [loss(row.router_loss), _share(row.router_share), _share(row.better_than)]
        rows.append([_share(row.target), f"{len(row.losses):,}", *_spread(row), *router])
    note = f"Mean loss of random networks of each budget, as a share of the full model’s {c.cost}, and of the routers’ network;"
    note += " better than: the random networks whose loss is higher."
    pictures = [figures.random_boxes(c)] if any(figures.finite(row.losses) for row in c.random) else []
    return Section(key, f"Routers against random networks{label}", note, [Table(head, rows)], pictures, beside=bool(pictures))


def _spread(row: RandomNetworks) -> list[str]:
    """Best, median and worst loss; a diverged network is the worst."""
    losses = sorted(row.losses, key=lambda value: (value != value, value))
    return [loss(losses[0]), loss(median(losses)), loss(losses[-1])] if losses else ["–"] * 3


def _equal_section(c: Comparison, key: str, label: str) -> Section:
    head = ["Baseline", "Network", "Share", "Mean loss", "Router’s share", "Router’s mean loss", "Difference"]
    rows = []
    for row in sorted(c.equal, key=lambda row: (SELECTORS.index(row.selector), -row.share)):
        difference = "–" if row.router_loss is None else signed(row.router_loss - row.mean_loss)
        router = [_share(row.router_share), loss(row.router_loss), difference]
        rows.append([row.selector, describe(row.subnetwork, c.model), _share(row.share), loss(row.mean_loss), *router])
    note = f"The routers asked for exactly the {c.cost} of a baseline’s network. Difference: the routers’ loss less the"
    note += " baseline’s; below zero, the routers are better."
    return Section(key, f"Routers against baselines of equal {c.cost}{label}", note, [Table(head, rows, left=2)], [])


def describe(net: SubNetwork, model: ModelConfig) -> str:
    """`50% heads, 75% FFN`; where layers differ the mean over all layers, a skipped one counting as 0."""
    heads = sum(layer.num_attention_heads for layer in net.layers if layer.executed) / model.num_attention_heads
    ffn = sum(layer.ffn_hidden_size for layer in net.layers if layer.executed) / model.ffn_hidden_size
    shares = f"{100 * heads / model.num_layers:.0f}% heads, {100 * ffn / model.num_layers:.0f}% FFN"
    return shares if net.is_uniform and all(layer.executed for layer in net.layers) else f"{shares} (mean)"


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)
