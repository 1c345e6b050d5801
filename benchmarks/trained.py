"""Parts shared by benchmarks of trained runs: command line, validation data, forward pass."""

from __future__ import annotations

import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")


def command(usage: str, paths: int, run: Callable[..., None]) -> None:
    """Command line of a benchmark: call `run` with paths, and with numbers given as `name=4`. Exits with one line on bad input.

    Args:
        usage: docstring whose first line is the usage.
        paths: least number of paths.
        run: benchmark; its keyword-only parameters are the numbers that may be given.
    """
    from flextron_mcore.config import FlextronError
    from flextron_mcore.runtime.environment import prepare_environment

    given = [argument for argument in sys.argv[1:] if "=" not in argument]
    pairs = (argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    numbers = {name: int(value) if value.isdecimal() else 0 for name, value in pairs}
    known = [name for name, each in inspect.signature(run).parameters.items() if each.kind is each.KEYWORD_ONLY]
    if len(given) < paths or not set(numbers) <= set(known) or 0 in numbers.values():
        sys.exit(f"{usage.splitlines()[0]} Numbers, from 1 on: {', '.join(f'{name}=' for name in known)}")
    prepare_environment()
    from flextron_mcore.runtime import distributed
    from flextron_mcore.runtime.memory import keep_freed_memory

    try:
        distributed.initialize()
        keep_freed_memory()
        run(*given, **numbers)
    except FlextronError as error:
        sys.exit(f"benchmarks: {error}")


def domains(path: str, length: int) -> Mapping[str, Any]:
    """{domain: validation dataset} of a directory that `flextron prepare` wrote. length: tokens of a sample."""
    from flextron_mcore.data.blend import open_data, valid_datasets

    with tempfile.TemporaryDirectory() as cache:
        return valid_datasets(open_data(path), length, 1234, cache)


def in_turn(datasets: Mapping[str, Any], count: int) -> Any:
    """Tokens [count, S] of the first validation sequences, domains in turn. Raises FlextronError if a domain has too few."""
    import torch

    from flextron_mcore.config import FlextronError
    from flextron_mcore.data.blend import batch
    from flextron_mcore.runtime.distributed import device

    each = -(-count // len(datasets))
    if short := [name for name, dataset in datasets.items() if len(dataset) < each]:
        raise FlextronError(
            f"data: {each} validation sequences of each domain are needed, {short[0]} has {len(datasets[short[0]])}: prepare "
            "more text"
        )
    return (
        torch.stack([batch(dataset, range(each))["tokens"] for dataset in datasets.values()], 1)
        .flatten(0, 1)[:count]
        .to(device())
    )


def settings(**keys: Any) -> Any:
    """Settings for runs/choice.py: defaults, by which table and costs are those of the checkpoint, and `keys`."""
    from flextron_mcore.settings.stages import EvaluateSettings

    return EvaluateSettings(**keys)


def forward(model: Any, net: Any, tokens: Any) -> object:
    """Logits of a forward pass over tokens [B, S].

    Args:
        model: elastic model.
        net: sub-network, or token routing (AdaptiveRouting).
        tokens: token ids.
    """
    import torch

    from flextron_mcore.adaptive.routing import AdaptiveRouting
    from flextron_mcore.choosing import set_subnetwork

    if isinstance(net, AdaptiveRouting):
        net.begin()
    set_subnetwork(model, net)
    return model(tokens, torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1), None)
