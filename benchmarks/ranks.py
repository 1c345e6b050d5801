"""Times of several processes on one machine.

With two pipeline stages: the networks of a step in one flush of the pipeline schedule, over a flush for each network. With data
parallelism: a step of two processes against a step of one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks import print_settings, ratio
from flextron_mcore.config import ModelConfig
from flextron_mcore.runs.terminal import print_table
from flextron_mcore.runtime import distributed

ROUNDS, NETWORKS, BATCH, LENGTH = 9, 4, 1, 256
MODEL = ModelConfig(
    num_layers=4, hidden_size=256, num_attention_heads=8, ffn_hidden_size=704, vocab_size=512, max_position_embeddings=LENGTH
)  # fmt: skip


def run() -> None:
    """Run the benchmark and print its two tables."""
    print_settings(
        "ranks: gloo processes on one machine, wall-clock time of the slowest",
        f"{MODEL.num_layers} layers, hidden {MODEL.hidden_size}, FFN {MODEL.ffn_hidden_size}, vocabulary {MODEL.vocab_size}; "
        f"{NETWORKS} networks a step, micro-batches of {BATCH} x {LENGTH} tokens, fp32, one thread a process unless stated",
        f"median (quartiles) of {ROUNDS} paired rounds",
    )
    rows = []
    for micro_batches in (1, 2, 4):
        seconds = _processes(2, "flushes", micro_batches)
        found = ratio(seconds["one flush"], seconds["four flushes"])
        ideal = (NETWORKS * micro_batches + 1) / (NETWORKS * (micro_batches + 1))
        times = [f"{1000 * statistics.median(values):.0f}" for values in seconds.values()]
        rows.append([micro_batches, *times, str(found), f"{ideal:.3f}"])
    columns = ["micro-batches", "one flush ms", "four flushes ms", "one / four", "bubbles alone"]
    print_table("PP2: four networks in one flush of the pipeline / a flush for each", columns, rows)
    rows = []
    for name, processes, threads in (("1 process", 1, 1), ("1 process, 2 threads", 1, 2), ("2 processes (DP2)", 2, 1)):
        times = [statistics.median(_processes(processes, "data", 4 // processes, threads)["step"]) for _ in range(3)]
        rows.append([name, f"{1000 * min(times):.0f}", f"{1000 * statistics.median(times):.0f}"])
    one = float(rows[0][2])
    rows = [[*row, f"{one / float(row[2]):.2f}"] for row in rows]
    title = "a step of 4 micro-batches and its optimizer step; medians of three starts"
    print_table(title, ["layout", "best ms", "median ms", "speed-up"], rows)


def _processes(count: int, what: str, micro_batches: int, threads: int = 1) -> dict[str, list[float]]:
    """Run `measure` in new processes, and return {name: seconds of each round}.

    Args:
        count: number of processes.
        what, micro_batches: arguments of `measure`.
        threads: OMP_NUM_THREADS of each process.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    finished = subprocess.run(
        [*command, "benchmarks.ranks", what, str(micro_batches)], env=environment, capture_output=True, text=True
    )
    if finished.returncode:
        sys.exit(finished.stderr)
    return json.loads(finished.stdout.splitlines()[-1])


def measure(what: str, micro_batches: int) -> None:
    """Time this rank's work, together with all others; rank 0 prints {name: seconds of each round} as JSON.

    Args:
        what: "flushes": passes on two pipeline stages, in one flush and in four. "data": a data-parallel step.
        micro_batches: micro-batches of this process in a step.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    from flextron_mcore.model import build_model
    from flextron_mcore.pipeline.networks import run_networks
    from flextron_mcore.settings.sections import LayoutSettings
    from flextron_mcore.space import ElasticSpace
    from flextron_mcore.training.sampler import draw

    layout = LayoutSettings(pipeline_model_parallel_size=2 if what == "flushes" else 1)
    distributed.initialize(layout)
    space = ElasticSpace.build(MODEL)
    gpt = build_model(MODEL, space, layout)
    model = DistributedDataParallel(gpt.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), gpt)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-4), [model])
    gpt.config.finalize_model_grads_func = finalize_model_grads
    tokens = torch.randint(0, MODEL.vocab_size, (BATCH, LENGTH + 1))
    batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    batch |= {"position_ids": torch.arange(LENGTH).expand(BATCH, -1), "loss_mask": torch.ones(BATCH, LENGTH)}
    networks = [None, *draw(MODEL, space, seed=1, step=0, count=NETWORKS - 1)]

    def passes(networks: list) -> None:
        run_networks([model], lambda: iter([batch] * micro_batches), micro_batches, networks, LENGTH, BATCH)

    def step() -> None:
        model.zero_grad_buffer()
        passes(networks)
        optimizer.step()

    compared = {"step": step}
    if what == "flushes":
        compared = {"one flush": lambda: passes(networks), "four flushes": lambda: [passes([net]) for net in networks]}
    seconds = _rounds(compared)
    if torch.distributed.get_rank() == 0:
        print(json.dumps(seconds))


def _rounds(compared: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """{name: wall-clock seconds of each round, until the last process has finished}; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in compared}
    for i in range(ROUNDS + 1):
        for name in list(compared) if i % 2 else reversed(compared):
            torch.distributed.barrier()
            begun = time.perf_counter()
            compared[name]()
            torch.distributed.barrier()
            if i:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


if __name__ == "__main__":
    measure(sys.argv[1], int(sys.argv[2]))
