"""`flextron evaluate`: validation loss and perplexity of each domain, and scores of tasks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from flextron_mcore.adaptive.serving import evaluate_adaptive
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.evaluation.family import uniform_family
from flextron_mcore.evaluation.perplexity import mean, perplexity
from flextron_mcore.runs.choice import select
from flextron_mcore.runs.opened import evaluator, open_evaluation
from flextron_mcore.runs.output import discard, new_output, write_metrics
from flextron_mcore.runs.tasks import open_tasks, print_scores
from flextron_mcore.runs.terminal import print_table, progress_bar, say, say_next
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.settings.stages import EvaluateSettings
from flextron_mcore.space import SubNetwork, count_parameters, kv_cache_bytes, weight_bytes
from flextron_mcore.training.sampler import random_family


def run(settings: EvaluateSettings) -> dict[str, Any]:
    """Evaluate the networks of settings.subnetwork or the budgets, or else the full model and all uniform sub-networks.

    With selector=adaptive, evaluate token routing at the budgets (`evaluate_adaptive`) instead. Call on all ranks. Returns
    the content of metrics.json: `networks` has a row for each; losses of the first one stand at the top level, too.
    """
    opened = open_evaluation(settings)
    info = opened.info
    given = [key for key in ("budget", "budgets", "subnetwork") if getattr(settings, key) is not None]
    if len(given) > 1 and (settings.selector != "adaptive" or "subnetwork" not in given):
        raise FlextronError(f"{given[0]}= and {given[1]}= are two ways to say which networks to evaluate: give only one")
    if settings.selector == "adaptive":
        say(opened.memory)
        return evaluate_adaptive(settings, opened)
    networks = _networks(settings, info)
    tasks = open_tasks(settings, opened)
    with new_output(settings) as out:
        with progress_bar(desc="evaluate") as bar:
            evaluation = evaluator(settings, opened, out / "cache", lambda done: bar.set_postfix_str(done) or bar.update())
            bar.reset(len(set(networks.values())) * len(evaluation.datasets))
            losses = dict(zip(networks, evaluation.losses(list(networks.values())), strict=True))
        discard(out / "cache")
        scores: dict[str, dict[str, Any]] = {}
        if tasks:
            distinct = list(dict.fromkeys(networks.values()))
            say(f"evaluate: scoring {len(settings.tasks)} tasks for {len(distinct)} networks")
            with progress_bar(desc="evaluate: tasks", unit="request") as bar:
                harness = tasks.harness(settings, opened, evaluation.model, bar.update)
                found = {net: harness.scores(net) for net in distinct}
            scores = {name: found[net] for name, net in networks.items()}
            on_main_process(lambda: tasks.write(out, Path(settings.out)))
        arch, kv = info.model, settings.kv_cache
        dtype = settings.trainer.precision or info.dtype
        length = kv.length or arch.default_length
        rows = []
        for name, net in networks.items():
            found = {domain: perplexity(loss) for domain, loss in losses[name].items()}
            average = mean(losses[name])
            rows.append(
                {
                    "name": name,
                    "subnetwork": net.to_dict(),
                    "parameters": count_parameters(arch, net),
                    "non_embedding_parameters": count_parameters(arch, net, embeddings=False),
                    "weight_bytes": weight_bytes(arch, net, dtype),
                    "kv_cache_bytes": kv_cache_bytes(arch, net, kv.batch_size, length, dtype),
                    "loss": losses[name],
                    "perplexity": found,
                    "mean": {"loss": average, "perplexity": perplexity(average)},
                    **({"tasks": scores[name]} if scores else {}),
                }
            )
        first = rows[0]
        metrics = write_metrics(
            out,
            "evaluate",
            {
                # Figures of the first network are repeated at the top level, for readers of a single one.
                "loss": first["loss"],
                "perplexity": first["perplexity"],
                "mean": first["mean"],
                "samples": evaluation.samples,
                "dtype": dtype,
                "kv_cache": {"batch_size": kv.batch_size, "length": length},
                "model": arch.to_dict(),
                "space": info.space.to_dict(),
                "networks": rows,
            },
        )
    print_table(
        "validation loss (nats per token)",
        ["network", "parameters", "weights MiB", "KV MiB", *evaluation.datasets, "mean", "perplexity"],
        [
            [
                r["name"],
                r["parameters"],
                r["weight_bytes"] / 2**20,
                r["kv_cache_bytes"] / 2**20,
                *r["loss"].values(),
                *r["mean"].values(),
            ]
            for r in rows
        ],
    )
    if scores:
        print_scores([(r["name"], {"parameters": r["parameters"]}, r["tasks"]) for r in rows])
    one = settings.subnetwork[0] if settings.subnetwork else None
    say_next("generate", checkpoint=settings.checkpoint, subnetwork=one, prompt="Once upon a time")
    return metrics


def _networks(settings: EvaluateSettings, info: CheckpointInfo) -> dict[str, SubNetwork]:
    """Networks to evaluate, {name: network}.

    They are the networks in the files of settings.subnetwork, named by the file without its ending, or by its path if two files
    have the same name; or the networks chosen for settings.budget or settings.budgets; or without any of these keys the uniform
    family, with the full model first. settings.random random networks follow.
    """
    wanted = settings.budgets or ([] if settings.budget is None else [settings.budget])
    if not wanted and settings.subnetwork is not None:
        names = Counter(Path(file).stem for file in settings.subnetwork)
        named = {file: Path(file).stem if names[Path(file).stem] == 1 else file for file in settings.subnetwork}
        networks = {name: info.network(file) for file, name in named.items()}
    elif not wanted:
        networks = uniform_family(info.model, info.space)
        networks = {"full": networks.pop("full"), **networks}
    else:
        chosen = [select(settings, info, budget=each) for each in wanted]
        networks = {f"{settings.selector} {' and '.join(map(str, parsed))}": network for network, parsed in chosen}
    if settings.random:
        networks.update(random_family(info.model, info.space, settings.seed, 0, settings.random))
    return networks
