"""`python -m benchmarks.equal_time STATIC DATA ADAPTIVE [ADAPTIVE ...]`: losses of adaptive and static routers at equal time.

STATIC: out of `flextron router`, or of `flextron joint` after it. DATA: out of `flextron prepare`. ADAPTIVE: outs of `flextron
router kind=adaptive` that started from STATIC, one for each KV policy, or of `flextron joint` after it. A time is measured
on forward passes over validation data, routers included; no latency table is used. For larger models, lower `sequences=` (of
each domain in a pass) and `samples=` (for the losses).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.trained import command, domains, forward, in_turn, settings
from flextron_mcore.settings.sections import LayoutSettings

TARGETS, LADDER = (0.6, 0.7, 0.8), [0.55, 0.65, 0.75, 0.85, 0.9, 0.95, 1.0]
BATCH = 8


def _run(static: str, data: str, *adaptive: str, sequences: int = 3, samples: int = 48, rounds: int = 15) -> None:
    import torch
    from tqdm import tqdm

    from benchmarks import interleaved, print_settings
    from flextron_mcore.adaptive.calibration import target_for
    from flextron_mcore.adaptive.routing import AdaptiveRouting
    from flextron_mcore.adaptive.store import read_adaptive_routers
    from flextron_mcore.checkpoint.store import open_checkpoint
    from flextron_mcore.choices import Choices
    from flextron_mcore.evaluation.perplexity import evaluate, mean
    from flextron_mcore.model import loaded_model
    from flextron_mcore.runs.terminal import print_table

    info = open_checkpoint(static)
    length, choices = info.model.max_position_embeddings, Choices(info.model, info.space)
    print_settings(
        "equal_time: adaptive routers, and the static routers' network at the same time",
        f"a forward pass over {sequences} x {length} tokens of each domain, processor time, median of {rounds} paired rounds;",
        f"losses: mean over domains, at most {samples} sequences each; static losses interpolated between "
        f"{len(LADDER) + len(TARGETS)} networks",
    )
    datasets = domains(data, length)
    tokens = in_turn(datasets, sequences * len(datasets))
    networks: dict[float, Any] = _static(info, sorted({*TARGETS, *LADDER}))
    model, *_ = loaded = loaded_model(LayoutSettings(), info, "fp32")
    calls: dict[Any, Any] = {share: partial(forward, model, net, tokens) for share, net in networks.items()}
    losses, rows = {}, []
    with tqdm(total=len(networks) + len(adaptive) * len(TARGETS) + rounds + 1, desc="equal_time") as bar:
        for share, net in networks.items():
            losses[share] = mean(evaluate(loaded, datasets, {"": net}, length, BATCH, samples)[""])
            bar.update()
        for path in adaptive:
            own = open_checkpoint(path)
            described, routers = read_adaptive_routers(own.path, choices)
            routed = loaded_model(LayoutSettings(), own, "fp32")  # joint tuning has changed the weights, too
            for share in TARGETS:
                target = torch.tensor([target_for(described.calibration, share, nearest=True)])
                chosen = AdaptiveRouting(routers.eval(), target, described.kv_policy)
                losses[path, share] = mean(evaluate(routed, datasets, {"": chosen}, length, BATCH, samples)[""])
                calls[path, share] = partial(forward, routed[0], chosen, tokens)
                rows.append([path, described.kv_policy, share])
                bar.update()
        with torch.no_grad():
            seconds = interleaved(calls, rounds, done=bar.update)
    times = {name: float(np.median(np.divide(values, seconds[LADDER[-1]]))) for name, values in seconds.items()}
    rising = np.maximum.accumulate([times[share] for share in networks])
    found = []
    for path, kv_policy, share in rows:
        at = (path, share)
        equal = float(np.interp(times[at], rising, [losses[each] for each in networks]))
        pairs = [f"{losses[each]:.4f} ({times[each]:.3f})" for each in (share, at)]
        found.append([Path(path).name, kv_policy, f"{share:g}", *pairs, f"{equal:.4f}", f"{equal - losses[at]:.4f}"])
    columns = ["routers", "keys", "budget", "static (time / full)", "adaptive (time / full)", "static at that time", "better by"]
    print_table("equal_time", columns, found)


def _static(info: Any, shares: list[float]) -> dict[float, Any]:
    """{share: network that the static routers choose for this share of the full model's cost}."""
    from flextron_mcore.cost import Budget
    from flextron_mcore.runs.choice import available_costs, latency_table, selector

    config = settings()
    costs = available_costs(config, info, latency_table(config, info))
    picks = selector(config, info, "router")
    cost = costs[next(iter(picks.costs))]
    return {share: picks.select([Budget(cost, share * cost.full)]) for share in shares}


if __name__ == "__main__":
    command(__doc__, 3, _run)
