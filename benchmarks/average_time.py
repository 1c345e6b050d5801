"""`python -m benchmarks.average_time DATA ADAPTIVE [ADAPTIVE ...]`: measured time of adaptive routers against their budget.

DATA: out of `flextron prepare`. ADAPTIVE: outs of `flextron router kind=adaptive` with a latency table that includes routing
(`flextron latency routed.enabled=true`). Forward passes have the size of the table's workload, over validation data of all
domains in turn. The calibration that is stored with the routers gives their input for a budget.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.trained import command, domains, forward, in_turn, settings
from flextron_mcore.settings.sections import LayoutSettings

BUDGETS = (0.6, 0.7, 0.8, 0.9)


def _run(data: str, *adaptive: str, passes: int = 6, rounds: int = 15) -> None:
    from flextron_mcore.checkpoint.store import open_checkpoint
    from flextron_mcore.config import FlextronError
    from flextron_mcore.runs.choice import check_table, latency_table
    from flextron_mcore.runs.terminal import print_table

    columns = ["routers", "keys", "budget", "predicted", "ms", "time / full", "off the budget", "by the static table", "levels"]
    if rounds < 2:
        raise FlextronError(f"rounds={rounds}: must be at least 2, for quartiles")
    for path in adaptive:
        info = open_checkpoint(path)
        table = latency_table(settings(), info)
        if table is None or not table.routed or table.setting["kind"] != "prefill":
            raise FlextronError(
                f"{path}: has no latency table of a prefill that includes routing: train it with the out of `flextron latency "
                "routed.enabled=true`"
            )
        check_table(table)
        datasets = domains(data, table.setting["prompt_length"])
        print_table("average_time", columns, _times(Path(path).name, info, table, datasets, passes, rounds))


def _times(name: str, info: Any, table: Any, datasets: Any, passes: int, rounds: int) -> list[list[str]]:
    """Rows of the table for one run: one for each of BUDGETS that its routers can meet. Raises FlextronError if they meet none.

    Args:
        name: name of the run in the table.
        info: checkpoint with adaptive routers.
        table: latency table, whose workload gives the size of a pass.
        datasets: {domain: validation dataset}.
        passes: number of forward passes in a timed call.
        rounds: number of paired rounds.
    """
    import torch

    from benchmarks import interleaved, print_settings, ratio
    from flextron_mcore.adaptive.serving import RoutersAtBudget, routers_at_budget
    from flextron_mcore.adaptive.usage import TokenCost
    from flextron_mcore.config import FlextronError
    from flextron_mcore.model import loaded_model

    setting = table.setting
    (model,) = loaded_model(LayoutSettings(), info, "bf16" if table.machine.get("dtype") == "bfloat16" else "fp32")
    model.eval()
    tokens = in_turn(datasets, passes * setting["batch_size"]).split(setting["batch_size"])
    machine = f"{table.machine.get('device')}, {table.machine.get('threads')} thread(s)"
    print_settings(
        f"average_time: {name}",
        f"{passes} passes of {setting['batch_size']} x {setting['prompt_length']} tokens, {', '.join(datasets)} mixed; median "
        f"(quartiles) of {rounds} paired rounds; the table: {machine}",
    )
    nets: dict[str, Any] = {"full": None}
    chosen: dict[str, RoutersAtBudget] = {}
    reasons = []
    for budget in BUDGETS:
        try:
            chosen[f"{budget:g}"] = routers_at_budget(settings(budget=budget, kv_policy=None), info)
        except FlextronError as error:  # a budget that these routers cannot meet
            reasons.append(f"{name}: {error}")
            continue
        nets[f"{budget:g}"] = chosen[f"{budget:g}"].routing()
    if len(nets) == 1:
        raise FlextronError(reasons[0])
    for reason in reasons:
        print(reason)
    calls = {budget: partial(_passes, model, net, tokens) for budget, net in nets.items()}
    with torch.no_grad():
        seconds = interleaved(calls, rounds)
    rows = []
    for budget, net in list(nets.items())[1:]:
        share_NK = (net.counts_NK / net.counts_NK.sum(-1, keepdim=True)).cpu().numpy()
        at = chosen[budget]
        predicted, static = at.share(share_NK), TokenCost(at.budget.cost).average(at.choices, share_NK) / at.budget.cost.full
        found = ratio(seconds[budget], seconds["full"])
        ms, off = 1000 * min(seconds[budget]) / passes, found.median / float(budget) - 1
        levels = " ".join(map(str, (share_NK > 0.002).sum(1)))
        rows.append(
            [name, net.kv_policy, budget, f"{predicted:.3f}", f"{ms:.1f}", str(found), f"{off:+.1%}", f"{static:.3f}", levels]
        )
    return rows


def _passes(model: Any, net: Any, batches: Any) -> None:
    for tokens in batches:
        forward(model, net, tokens)


if __name__ == "__main__":
    command(__doc__, 2, _run)
