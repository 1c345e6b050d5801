"""Time of a sub-network over a dense model of its shape: forward and backward of a micro-batch, and forward alone."""

from __future__ import annotations

import statistics

import torch
from tqdm import tqdm

from benchmarks import Ratio, interleaved, print_settings, ratio
from benchmarks.models import (
    DESCRIPTION,
    GPT2,
    LLAMA,
    LLAMA_DEEP,
    LLAMA_GQA,
    LLAMA_TIED,
    LLAMA_WORDY,
    dense,
    elastic,
    forward_backward,
    micro_batch,
    prefill,
)
from flextron_mcore.choosing import set_subnetwork
from flextron_mcore.config import ModelConfig
from flextron_mcore.runs.terminal import print_table
from flextron_mcore.runtime import distributed
from flextron_mcore.space import ElasticSpace, SubNetwork

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
ROUNDS = 7
ALL = "heads + ffn + hidden + depth"
# {name: (model, attention unit, axes that are made smaller)}
CASES = {
    "llama": (LLAMA, "kv_group", ("heads + ffn", "ffn", "hidden", "heads + ffn + hidden")),
    "llama, vocabulary 16384": (LLAMA_WORDY, "kv_group", ("hidden",)),
    "llama, tied, vocabulary 16384": (LLAMA_TIED, "kv_group", ("hidden",)),
    "llama, 4 layers": (LLAMA_DEEP, "kv_group", ("depth", ALL)),
    "llama, 4 KV groups": (LLAMA_GQA, "kv_group", ("heads + ffn",)),
    "llama, 4 KV groups, heads of each": (LLAMA_GQA, "query_head", ("heads + ffn",)),
    "gpt2": (GPT2, "kv_group", ("heads + ffn", "ffn", "hidden", "heads + ffn + hidden")),
}


def run() -> None:
    """Run the benchmark and print its table."""
    distributed.initialize()
    print_settings(
        "slice: a uniform sub-network / a dense Megatron-Core model of its shape",
        "forward + backward of a micro-batch; prefill: forward for its logits, without gradients",
        DESCRIPTION,
        f"median (quartiles) of {ROUNDS} paired rounds; 'fastest': ratio of the fastest times",
        "dense: stock model with the attention kernel and norms of the elastic layers; stock: Megatron-Core's local spec",
    )
    rows, medians, forwards = [], [], []
    with tqdm(desc="slice", unit="row") as bar:
        for name, (model, unit, axes) in CASES.items():
            space = ElasticSpace.build(model, attention_unit=unit, heads=FRACTIONS, ffn_hidden_size=FRACTIONS)
            ours = elastic(model, space)
            for axis in axes:
                for fraction in FRACTIONS if axis == axes[0] else FRACTIONS[:-1]:
                    milliseconds, to_dense, to_stock, forward = _compare(ours, model, _network(model, space, axis, fraction))
                    figures = [str(to_dense), f"{to_dense.minima:.3f}", str(to_stock), str(forward)]
                    rows.append([name, axis, f"{fraction:.0%}", *milliseconds, *figures])
                    if fraction < 1:
                        medians.append(to_dense.median)
                        forwards.append(forward.median)
                    bar.update()
    print_table(
        "slice",
        ["model", "shrunk", "width", "elastic ms", "dense ms", "stock ms", "elastic / dense", "fastest", "elastic / stock"]
        + ["prefill elastic / dense"],
        rows,
    )
    for what, found in (("forward + backward", medians), ("prefill", forwards)):
        print(
            f"{what}, elastic / dense below 100 %: {statistics.median(found):.3f} (median row), {max(found):.3f} (highest row)",
            flush=True,
        )


def _network(model: ModelConfig, space: ElasticSpace, axes: str, fraction: float) -> SubNetwork:
    """Sub-network with a fraction of the named axes and the full size of the others."""
    full = {"heads": model.num_attention_heads, "ffn": model.ffn_hidden_size, "hidden": model.hidden_size}
    full["depth"] = model.num_layers
    sizes = [round(size * (fraction if axis in axes.split(" + ") else 1)) for axis, size in full.items()]
    return space.uniform(model, *sizes)


def _compare(ours: torch.nn.Module, model: ModelConfig, net: SubNetwork) -> tuple[list[str], Ratio, Ratio, Ratio]:
    """(fastest milliseconds of elastic, dense, stock; elastic / dense; elastic / stock; elastic / dense of forward alone)."""
    set_subnetwork(ours, net)
    batch = micro_batch(model.vocab_size)
    theirs = dense(model, net)
    seconds = interleaved(
        {
            "elastic": forward_backward(ours, batch),
            "dense": forward_backward(theirs, batch),
            "stock": forward_backward(dense(model, net, fully_stock=True), batch, with_mask=True),
        },
        ROUNDS,
    )
    forward = interleaved({"elastic": prefill(ours, batch), "dense": prefill(theirs, batch)}, ROUNDS)
    milliseconds = [f"{1000 * min(times):.0f}" for times in seconds.values()]
    to_dense, to_stock = (ratio(seconds["elastic"], seconds[other]) for other in ("dense", "stock"))
    return milliseconds, to_dense, to_stock, ratio(forward["elastic"], forward["dense"])
