"""`flextron elastic`: elastic continued training (Flextron, section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from flextron_mcore.config import FlextronError
from flextron_mcore.stages.common import print_table, start, write_metrics
from flextron_mcore.stages.resume import resumable_output

if TYPE_CHECKING:
    from flextron_mcore.pipeline.networks import Distillation


def run(config: DictConfig) -> dict[str, Any]:
    """Train the full model and config.num_subnetworks random sub-networks together."""
    start(config)
    from flextron_mcore.checkpoint.store import open_checkpoint
    from flextron_mcore.data.blend import open_data
    from flextron_mcore.evaluation.family import uniform_family
    from flextron_mcore.training.loop import Phase, check, train
    from flextron_mcore.training.sampler import draw, random_family

    info, data = open_checkpoint(config.checkpoint), open_data(config.data)
    check_space(config, info)
    seq_length = check(config, info, data, 1 + config.num_subnetworks)
    teach = distillation(config)
    model, space = info.model, info.space
    draw(model, space, config.seed, 0, config.num_subnetworks, config.mode)
    uniform = uniform_family(model, space)
    phase = Phase(
        networks=lambda step: [None, *draw(model, space, config.seed, step, config.num_subnetworks, config.mode)],
        validation=lambda step: {
            **uniform,
            **random_family(model, space, config.seed, step, config.validation_subnetworks, config.mode),
        },
        teach=teach,
    )
    with resumable_output(config, info, data) as out:
        figures = train(config, out, info, data, phase, seq_length)
        first, last = figures["validation"]["first"], figures["validation"]["last"]
        rows = [[name, first.get(name, float("nan")), last[name]] for name in uniform]
        print_table("validation loss (nats per token), mean over domains", ["network", "before", "after"], rows)
        return write_metrics(out, "elastic", figures)


def distillation(config: DictConfig) -> Distillation:
    """That of config.distillation. Raises FlextronError for values that are none."""
    from flextron_mcore.pipeline.networks import Distillation

    if not 0 <= config.distillation.weight <= 1 or config.distillation.temperature <= 0:
        raise FlextronError("distillation.weight must be within 0..1 and distillation.temperature above 0")
    return Distillation(config.distillation.weight, config.distillation.temperature)


def check_widths_only(info: Any, what: str) -> None:
    """Raise FlextronError where hidden size or depth is elastic, of which `what` knows nothing."""
    for axis in ("hidden_size", "depth"):
        if len(sizes := getattr(info.space, axis)) > 1:
            raise FlextronError(
                f"checkpoint={info.path}: its space.{axis} is elastic, {list(sizes)}, and {what} chooses heads and neurons only: "
                "use `flextron gumbel`, or sort it for another space with `flextron importance`"
            )


def check_not_modulated(info: Any) -> None:
    """Raise FlextronError where gains depend on the network, which tokens that choose for themselves do not have."""
    if info.space.modulation:
        raise FlextronError(
            f"checkpoint={info.path}: has modulation, gains that depend on the one network in use: its tokens cannot choose for "
            "themselves; use kind=static, or `flextron gumbel`"
        )


def check_space(config: DictConfig, info: Any) -> None:
    """Raise FlextronError when the configuration asks for another space than the checkpoint's."""
    from flextron_mcore.space import ElasticSpace

    have = info.space.to_dict()
    wanted = {k: v for k, v in OmegaConf.to_container(config.space).items() if v is not None}
    for name in ("granularity", "attention_unit", *have):
        if name not in wanted:
            continue
        value = wanted[name]
        if isinstance(value, list):
            value = ElasticSpace.from_dict(info.model, {**have, name: value}).to_dict()[name]
        if value != have[name]:
            raise FlextronError(
                f"checkpoint={info.path}: is of another space: its {name} is {have[name]}, not {value}; "
                "leave space.* out, or sort the checkpoint for that space with `flextron importance`"
            )
