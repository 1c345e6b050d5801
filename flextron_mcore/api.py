"""Functions of the public API that have no room of their own: what commands do, for a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flextron_mcore.adaptive.export import exported_routers
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.runs import choice
from flextron_mcore.runs.output import check_output
from flextron_mcore.runtime import distributed
from flextron_mcore.runtime.disk import write_aside
from flextron_mcore.runtime.environment import prepare_environment
from flextron_mcore.settings.compose import compose
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.space import SubNetwork


def initialize(seed: int = 1234, **parallel: int) -> None:
    """Start torch.distributed and Megatron-Core's process groups for this process; call before `build_model`.

    parallel: tensor_model_parallel_size, pipeline_model_parallel_size, virtual_pipeline_model_parallel_size. Without torchrun it
    is a world of one process, on the GPU if there is one. Silences Megatron-Core's warnings of packages that it does not find.
    Raises FlextronError when the processes do not fit the layout.

    >>> initialize()
    """
    prepare_environment()
    distributed.initialize(LayoutSettings(**parallel), seed)


def select(
    checkpoint: str | Path, budget: str | float, selector: str = "router", latency: str | Path | None = None
) -> SubNetwork:
    """Sub-network of a checkpoint for a budget, as `flextron select` chooses it.

    budget: "25ms", "3.4B", "8GiB", "0.6 parameters", or 0.6 (of the full model's latency). selector: `router`, the checkpoint's
    own trained routers, `uniform` or `matformer`. latency: a table of `flextron latency`, by default the one beside the routers.
    Raises FlextronError for a budget that no network has, or routers that there are not.

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
    """Write a sub-network of a checkpoint, by default the full model, as a dense model into the new directory `out`.

    format: hf, hf_elastic, trtllm, gguf or megatron. dtype: fp32, bf16 or fp16, by default the checkpoint's. Returns the format,
    architecture, parameters, bytes and files. Nothing is left of `out` if it fails. Raises FlextronError when `out` exists, `net`
    is not in the checkpoint's space, or the format cannot hold it. `flextron export` also reads back what it wrote.

    >>> written = export(checkpoint, folder / "sixty_percent", select(checkpoint, "0.6 parameters", selector="uniform"))
    >>> written["format"]
    'hf'
    """
    settings = compose("export", values=[{"checkpoint": str(checkpoint), "out": str(out), "format": format, "dtype": dtype}])
    info, target = open_checkpoint(settings.checkpoint), Path(settings.out)
    if net is not None and format == "hf_elastic":
        raise FlextronError("format=hf_elastic: holds every sub-network, so give no net: it is set on the model it loads as")
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
        return get_format(format).write(job)
