"""`flextron export`: a sub-network as a directory that other software loads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flextron_mcore.adaptive.export import exported_routers
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.exports.formats import Format, Job, check_format, get_format
from flextron_mcore.model import check_layout, loaded_model
from flextron_mcore.pipeline.logits import forward_logits
from flextron_mcore.runs.choice import chosen_network
from flextron_mcore.runs.compensation import NOT_COMPENSATED, compensate, open_calibration
from flextron_mcore.runs.memory import comparison_line
from flextron_mcore.runs.output import check_output, new_output, write_metrics
from flextron_mcore.runs.terminal import print_table, progress_bar, say
from flextron_mcore.runtime.memory import keep_freed_memory
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.settings.stages import ExportSettings
from flextron_mcore.space import SubNetwork, count_parameters


def run(settings: ExportSettings) -> dict[str, Any]:
    """Write the chosen network (format=hf_elastic: all networks) to settings.out, and with verify=true compare logits.

    compensate=true first refits the projections of layers with fewer heads or neurons. Call on all ranks, among which the files
    of weights are divided. Returns the content of metrics.json: the result of `Format.write`, `max_logit_difference` (None for
    verify=false), `subnetwork`, and `compensation` (`Compensated.figures`) if projections were refitted.
    """
    check_output(Path(settings.out), settings.overwrite)
    check_format(settings.format)
    if settings.format == "hf_elastic" and not (settings.budget is None and settings.subnetwork is None):
        raise FlextronError(
            "format=hf_elastic: holds every sub-network, so give no subnetwork= or budget=: call set_subnetwork or set_budget on "
            "the loaded model"
        )
    if settings.format == "hf_elastic" and settings.compensate:
        raise FlextronError(
            "format=hf_elastic: all sub-networks share its weights, which compensate=true would refit for one: use format=hf"
        )
    keep_freed_memory()
    info = open_checkpoint(settings.checkpoint)
    chosen = chosen_network(settings, info)
    net = chosen.network
    calibration = open_calibration(settings, info, net) if settings.compensate else None
    if settings.verify:
        check_layout(info.model, info.space, settings.model)
    written = get_format(settings.format)
    own, routers = getattr(settings, settings.format, None), None
    if settings.format == "hf_elastic":
        routers = on_main_process(lambda: exported_routers(info, own.latency))
    compared = SubNetwork.full(info.model) if settings.format == "hf_elastic" else net
    say(calibration.memory if calibration else comparison_line(settings, info, compared))
    with new_output(settings) as out:
        job = Job(
            info,
            net,
            out,
            settings.dtype,
            settings.max_shard_size,
            settings=own,
            origin=chosen.origin,
            token_routers=routers,
        )
        written.check(job)  # before the calibration, which takes minutes
        compensated = compensate(settings, calibration, net, out / "cache") if calibration else NOT_COMPENSATED
        with progress_bar(unit="B", unit_scale=True, desc="export") as bar:
            job = replace(job, progress=bar.update, refitted=compensated.refitted, refit=compensated.text)
            figures = written.write(job)
        if figures["parameters"] != count_parameters(info.model, net):
            raise FlextronError(f"export: wrote {figures['parameters']} parameters, counted {count_parameters(info.model, net)}")
        figures["max_logit_difference"] = _verify(settings, written, job, compensated.model) if settings.verify else None
        figures |= {"compensation": compensated.figures} if compensated.figures else {}
        metrics = write_metrics(out, "export", {**figures, "subnetwork": net.to_dict()})
    print_table(
        f"exported to {settings.out}",
        ["format", "architecture", "parameters", "bytes", "largest logit difference"],
        [
            [
                figures["format"],
                figures["architecture"],
                figures["parameters"],
                figures["bytes"],
                "not compared (verify=false)" if (found := figures["max_logit_difference"]) is None else f"{found:.1e}",
            ]
        ],
    )
    if "selector" in figures:
        say(f"selector {figures['selector']} chose {figures['networks']} networks for budgets")
    return metrics


def _verify(settings: ExportSettings, written: Format, job: Job, model: Sequence[torch.nn.Module] | None) -> float:
    """Largest absolute difference between logits of the export, read back, and of Megatron-Core (fp32), on random tokens.

    Compared are the networks of `Format.networks`: the exported one, for hf_elastic several. Megatron-Core computes in the layout
    of `settings`, the export on the main process; the result is equal on all ranks. Raises FlextronError for a difference above
    the format's tolerance.

    Args:
        settings: settings of the stage.
        written: format of the export.
        job: the export.
        model: this rank's chunks of the model with refitted weights; None for the checkpoint's.
    """
    info = job.info
    length = min(info.model.max_position_embeddings, 64)
    if settings.model.sequence_parallel:
        length -= length % settings.model.tensor_model_parallel_size
    tokens = torch.randint(0, info.model.vocab_size, (2, length), generator=torch.Generator().manual_seed(settings.seed))
    model, worst = model or loaded_model(settings.model, info, "fp32"), 0.0
    for net in written.networks(job):
        ours = forward_logits(model, net, tokens).cpu()
        found = on_main_process(lambda: (ours - written.logits(job, net, tokens)).abs().max().item())  # noqa: B023
        if not found <= (allowed := written.tolerance(job)):
            raise FlextronError(
                f"export: logits differ by {found:.2e} from the checkpoint's, at most {allowed:.0e} is expected: do not use this "
                "export; please report it"
            )
        worst = max(worst, found)
    return worst
