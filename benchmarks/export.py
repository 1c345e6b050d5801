"""Export of a half-width sub-network of a 7-billion-parameter Llama: peak memory, and time over a copy of the written bytes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import print_settings
from benchmarks.stream import MEASURE, copy_seconds, read_files, room, run_command
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.runs.terminal import print_table

if TYPE_CHECKING:
    from flextron_mcore.space import ElasticSpace

NEEDED_BYTES = 30 * 2**30
FORMATS = ("hf", "megatron")
# Shape of Llama-2-7B.
MODEL = dict(
    num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008, vocab_size=32000, max_position_embeddings=4096
)  # fmt: skip


def run() -> None:
    """Run the benchmark and print its table."""
    print_settings(
        "export: half of the heads and neurons of every layer of a random Llama of Llama-2-7B's shape in bf16 (6.74 billion",
        "parameters): peak resident memory of the process, and its time / time of a plain copy of the written bytes; both are",
        "synced to the disk; the checkpoint is in the page cache; copy: mean of two copies right after",
    )
    with room("export", NEEDED_BYTES) as folder:
        run_command([sys.executable, "-c", "from benchmarks.export import write as f; f(__import__('sys').argv[1])", str(folder)])
        rows = [_row(folder, format_) for format_ in FORMATS]
    print_table("export", ["format", "parameters", "GiB written", "peak GiB", "seconds", "copy seconds", "export / copy"], rows)


def _row(folder: Path, format_: str) -> list[str]:
    out = folder / "out"
    command = [sys.executable, "-m", "flextron_mcore", "export", f"checkpoint={folder}/run", f"subnetwork={folder}/half.json"]
    command += [f"format={format_}", "verify=false", f"out={out}"]
    print(f"export: {format_} ...", file=sys.stderr, flush=True)
    read_files(folder / "run")
    code, peak, seconds, *_ = json.loads(run_command([sys.executable, "-c", MEASURE, *command]))
    if code:
        raise FlextronError(f"{format_}: failed with exit code {code}")
    begun = time.perf_counter()
    for file in out.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened)
    seconds += time.perf_counter() - begun
    figures = json.loads((out / "metrics.json").read_text())
    copies = [copy_seconds(out), copy_seconds(out)]
    shutil.rmtree(out)
    copy = sum(copies) / 2
    return [
        format_,
        f"{figures['parameters']:,}",
        f"{figures['bytes'] / 2**30:.2f}",
        f"{peak / 2**30:.2f}",
        f"{seconds:.1f}",
        f"{copy:.1f} ({copies[0]:.1f}, {copies[1]:.1f})",
        f"{seconds / copy:.1f}",
    ]


def write(directory: str) -> None:
    """Write a random checkpoint as DIRECTORY/run, and a half-width sub-network as DIRECTORY/half.json."""
    from flextron_mcore.runtime.environment import prepare_environment

    prepare_environment()
    from flextron_mcore.space import ElasticSpace

    model = ModelConfig(**MODEL)
    space = ElasticSpace.build(model)
    random_run(Path(directory, "run"), model, space)
    Path(directory, "half.json").write_text(space.uniform(model, 16, 5504).to_json())


def random_run(run: Path, model: ModelConfig, space: ElasticSpace) -> None:
    """Write a checkpoint of random numbers in bf16 into the run directory `run`.

    Args:
        run: directory to make.
        model: architecture.
        space: elastic space.
    """
    import torch

    from flextron_mcore.checkpoint.store import CheckpointInfo, iteration_path
    from flextron_mcore.checkpoint.writer import LazyTensor, write_streaming
    from flextron_mcore.exports.cut import placed_tensors
    from flextron_mcore.space import SubNetwork

    # One block of random numbers is repeated, because drawing billions of them takes longer than writing them.
    block = torch.empty(2**24, dtype=torch.bfloat16).normal_(std=0.02)

    def fill(shape: tuple[int, ...]) -> torch.Tensor:
        numel = torch.Size(shape).numel()
        return block.repeat(-(-numel // block.numel()))[:numel].view(shape)

    tensors = {
        placed.name: LazyTensor(placed.shape, torch.bfloat16, lambda shape=placed.shape: fill(shape))
        for placed in placed_tensors(model, SubNetwork.full(model))
    }
    folder = iteration_path(run, 0)
    folder.mkdir(parents=True)
    write_streaming(folder, CheckpointInfo(model, space, "bf16"), tensors)
