"""Two ways to get gradients of weight slices: added in place, and padded by autograd with zeros to the size of the weight."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks import interleaved, print_settings, ratio
from benchmarks.models import elastic
from flextron_mcore.config import ModelConfig
from flextron_mcore.layers import linear
from flextron_mcore.pipeline.networks import run_networks
from flextron_mcore.runs.terminal import print_table
from flextron_mcore.runtime import distributed
from flextron_mcore.space import ElasticSpace

ROUNDS, BATCH, LENGTH = 7, 1, 256
# Wide layers and few tokens, so that most memory traffic is weights and their gradients.
MODEL = ModelConfig(
    num_layers=2, hidden_size=1024, num_attention_heads=16, ffn_hidden_size=8192, vocab_size=512, max_position_embeddings=LENGTH
)  # fmt: skip
FRACTIONS = (0.25, 0.5, 1.0)


def run() -> None:
    """Run the benchmark and print its table."""
    distributed.initialize()
    print_settings(
        "gradients: forward + backward of a uniform sub-network; gradients added in place / padded with zeros by autograd",
        f"{MODEL.num_layers} layers, hidden {MODEL.hidden_size}, FFN {MODEL.ffn_hidden_size}, {BATCH} x {LENGTH} tokens, fp32, "
        "DDP with main_grad",
        f"median (quartiles) of {ROUNDS} paired rounds; 'peak': memory of a separate process above the built model",
    )  # fmt: skip
    rows = []
    for fraction in FRACTIONS:
        steps = {name: _step(fraction, padded=name == "padded") for name in ("in place", "padded")}
        seconds = interleaved(steps, ROUNDS)
        found = ratio(seconds["in place"], seconds["padded"])
        peaks = [_peak(fraction, padded) for padded in (False, True)]
        milliseconds = [f"{1000 * min(times):.0f}" for times in seconds.values()]
        rows.append([f"{fraction:.0%}", *milliseconds, str(found), *(f"{peak / 2**20:.0f}" for peak in peaks)])
    columns = ["width", "in place ms", "padded ms", "in place / padded", "in place peak MiB", "padded peak MiB"]
    print_table("gradients", columns, rows)


def _step(fraction: float, padded: bool):
    """Function that runs a uniform sub-network forward and backward.

    Args:
        fraction: share of heads and neurons.
        padded: True leaves the gradients of slices to autograd.
    """
    space = ElasticSpace.build(MODEL, heads=FRACTIONS, ffn_hidden_size=FRACTIONS)
    model = elastic(MODEL, space)
    net = space.uniform(MODEL, round(fraction * MODEL.num_attention_heads), round(fraction * MODEL.ffn_hidden_size))
    tokens = torch.randint(0, MODEL.vocab_size, (BATCH, LENGTH + 1))
    batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    batch |= {"position_ids": torch.arange(LENGTH).expand(BATCH, -1), "loss_mask": torch.ones(BATCH, LENGTH)}

    def step() -> None:
        with _autograd() if padded else _in_place():
            run_networks([model], lambda: iter([batch]), 1, [net], LENGTH, BATCH)

    return step


@contextmanager
def _in_place() -> Iterator[None]:
    yield


@contextmanager
def _autograd() -> Iterator[None]:
    """Context in which slices are taken by plain indexing, so that autograd pads their gradients."""
    ours = linear.take_all

    def indexed(weight: torch.Tensor | None, *parts: linear.Selection, embedded: bool = False) -> tuple[torch.Tensor | None, ...]:
        if weight is None or embedded:  # both ways look up the rows of an embedding, without slices
            return ours(weight, *parts, embedded=embedded)
        return tuple(part.take(weight) for part in parts)

    linear.take_all = indexed
    try:
        yield
    finally:
        linear.take_all = ours


def _peak(fraction: float, padded: bool) -> int:
    """Peak bytes above the built model during steps: with CUDA in this process, else in one of its own."""
    if torch.cuda.is_available():
        step = _step(fraction, padded)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, "-m", "benchmarks.gradients", str(fraction), str(int(padded))]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    finished = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    """Print the peak bytes of three steps above the built model. Arguments of the process: fraction, padded (0 or 1)."""
    distributed.initialize()
    fraction, padded = float(sys.argv[1]), bool(int(sys.argv[2]))
    step = _step(fraction, padded)
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's peak to the current memory
    before = _status("VmRSS")
    for _ in range(3):
        step()
    print(_status("VmHWM") - before)


def _status(name: str) -> int:
    """Bytes of a field of /proc/self/status."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
