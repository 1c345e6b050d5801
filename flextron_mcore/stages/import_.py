"""`flextron import`: a Hugging Face checkpoint to an elastic checkpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from flextron_mcore.checkpoint.hf import copy_tokenizer, import_hf, open_hf
from flextron_mcore.checkpoint.store import iteration_path
from flextron_mcore.checkpoint.writer import write_streaming
from flextron_mcore.runs.output import check_output, new_output, write_metrics
from flextron_mcore.runs.terminal import print_table, progress_bar
from flextron_mcore.runtime.ranks import on_main_process, processes_on_cpu
from flextron_mcore.settings.stages import ImportSettings
from flextron_mcore.space import count_parameters


def run(settings: ImportSettings) -> dict[str, Any]:
    """Stream settings.hf into an elastic checkpoint, units in the order they have. Several ranks share the tensors."""
    check_output(Path(settings.out), settings.overwrite)
    source = open_hf(Path(settings.hf))
    info, tensors = import_hf(source, asdict(settings.space), settings.dtype)
    size = sum(t.dtype.itemsize * _numel(t.shape) for t in tensors.values())
    with processes_on_cpu(), new_output(settings) as out:
        folder = iteration_path(out, 0)
        folder.mkdir(parents=True, exist_ok=True)
        with progress_bar(total=size, unit="B", unit_scale=True, desc="import") as bar:
            write_streaming(folder, info, tensors, bar.update)
        figures = {
            "parameters": count_parameters(info.model),
            "bytes": size,
            "dtype": info.dtype,
            "tokenizer": on_main_process(lambda: copy_tokenizer(Path(settings.hf), out / "tokenizer")),
            "model": info.model.to_dict(),
            "space": info.space.to_dict(),
        }
        metrics = write_metrics(out, "import", figures)
    space = info.space
    print_table(
        f"imported {settings.hf}: {figures['parameters']:,} parameters, {info.dtype}",
        ["axis", "candidates"],
        [
            *([axis.name, ", ".join(map(str, space.sizes[axis.name]))] for axis in space.layer_axes),
            ["attention_unit", space.attention_unit],
            ["granularity (largest tensor-parallel size)", space.granularity],
        ],
    )
    return metrics


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
