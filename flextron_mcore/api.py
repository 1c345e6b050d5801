"""Functions of the public API that do what a command does: initialize, select, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flextron_mcore.adaptive.export import exported_routers
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.digests import write_digests
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.runs import choice
from flextron_mcore.runs.inputs import check_inputs
from flextron_mcore.runs.output import check_output
from flextron_mcore.runtime import distributed
from flextron_mcore.runtime.disk import write_aside
from flextron_mcore.runtime.environment import prepare_environment
from flextron_mcore.settings.compose import compose
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.space import SubNetwork


def initialize(seed: int = 1234, **parallel: int) -> None:
    """Start torch.distributed and Megatron-Core's process groups. Call before `build_model`.

    Without torchrun there is one process, on the GPU if there is one. Megatron-Core's warnings about missing packages are
    silenced. Raises FlextronError if the number of processes does not fit the layout.

    Args:
        seed: seed of the random numbers.
        parallel: tensor_model_parallel_size, pipeline_model_parallel_size, virtual_pipeline_model_parallel_size.

    >>> initialize()
    """
    prepare_environment()
    distributed.initialize(LayoutSettings(**parallel), seed)


def select(
    checkpoint: str | Path, budget: str | float, selector: str = "router", latency: str | Path | None = None
) -> SubNetwork:
    """Choose a sub-network of a checkpoint for a budget, as `flextron select` does.

    Raises FlextronError for a budget that no sub-network meets, and for a checkpoint without routers if they are needed.

    Args:
        checkpoint: directory of a checkpoint, or of a run.
        budget: a cost with its unit ("25ms", "3.4B" parameters, "8GiB"), or a fraction of the full model's ("0.6 parameters";
            0.6 alone: of its latency).
        selector: `router` (the checkpoint's trained routers), `uniform` or `matformer`.
        latency: latency table: a file, or the directory of a `flextron latency` run; None for the table beside the routers.

    >>> net = select(checkpoint, "0.6 parameters", selector="uniform")
    >>> net.is_uniform
    True
    """
    keys = {"checkpoint": str(checkpoint), "budget": budget, "selector": selector, "latency": latency and str(latency)}
    settings = compose("select", values=[keys])
    return choice.select(settings, open_checkpoint(settings.checkpoint))[0]


def export(
    checkpoint: str | Path, out: str | Path, net: SubNetwork | None = None, format: str = "hf", dtype: str | None = None
) -> dict[str, Any]:
    """Write a sub-network of a checkpoint as a dense model, as `flextron export` does without reading it back.

    On failure nothing is left of `out`. Raises FlextronError if `out` exists, `net` is not in the checkpoint's space, or the
    format cannot hold it.

    Args:
        checkpoint: directory of a checkpoint, or of a run.
        out: directory to create.
        net: sub-network, None for the full model.
        format: hf, hf_elastic (all sub-networks in one directory), trtllm, gguf or megatron.
        dtype: fp32, bf16 or fp16; None for the checkpoint's.

    Returns:
        {"format", "architecture", "parameters", "bytes" (size of all files), "files" (their number)}, and for some formats more,
        as in metrics.json.

    >>> written = export(checkpoint, folder / "sixty_percent", select(checkpoint, "0.6 parameters", selector="uniform"))
    >>> written["format"]
    'hf'
    """
    settings = compose("export", values=[{"checkpoint": str(checkpoint), "out": str(out), "format": format, "dtype": dtype}])
    info, target = open_checkpoint(settings.checkpoint), Path(settings.out)
    if net is not None and format == "hf_elastic":
        raise FlextronError("format=hf_elastic: holds every sub-network, so give no net: set it on the loaded model")
    check_inputs(settings)
    check_output(target, overwrite=False)
    own = getattr(settings, format, None)
    routers = exported_routers(info, own.latency) if format == "hf_elastic" else None
    with write_aside(target) as folder:
        job = Job(
            info,
            net or SubNetwork.full(info.model),
            folder,
            settings.dtype,
            settings.max_shard_size,
            settings=own,
            token_routers=routers,
        )
        written = get_format(format).write(job)
        write_digests(folder)
        return written
