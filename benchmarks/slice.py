"""A sub-network over a dense model of its shape: forward and backward of one micro-batch."""

from __future__ import annotations

import statistics

import torch
from tqdm import tqdm

from benchmarks import Ratio, interleaved, print_settings, ratio
from benchmarks.models import DESCRIPTION, GPT2, LLAMA, LLAMA_GQA, dense, elastic, forward_backward, micro_batch
from flextron_mcore.config import ModelConfig
from flextron_mcore.model import set_subnetwork
from flextron_mcore.runtime import distributed
from flextron_mcore.space import ElasticSpace, SubNetwork
from flextron_mcore.stages.common import print_table

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
ROUNDS = 7
# name: model, elastic unit of attention, what shrinks
CASES = {
    "llama": (LLAMA, "kv_group", ("heads + ffn", "ffn")),
    "llama, 4 KV groups": (LLAMA_GQA, "kv_group", ("heads + ffn",)),
    "llama, 4 KV groups, heads of each": (LLAMA_GQA, "query_head", ("heads + ffn",)),
    "gpt2": (GPT2, "kv_group", ("heads + ffn", "ffn")),
}


def run() -> None:
    """Print the ratios."""
    distributed.initialize()
    print_settings(
        "slice: forward + backward of a uniform sub-network / of a dense Megatron-Core model of its shape",
        DESCRIPTION,
        f"median (quartiles) of {ROUNDS} paired rounds; 'fastest': ratio of the fastest times",
        "dense: stock model with the elastic layers' attention kernel and norms; stock: Megatron-Core's local spec unchanged",
    )
    rows, medians = [], []
    with tqdm(desc="slice", unit="row") as bar:
        for name, (model, unit, axes) in CASES.items():
            space = ElasticSpace.build(model, attention_unit=unit, heads=FRACTIONS, ffn_hidden_size=FRACTIONS)
            ours = elastic(model, space)
            for axis in axes:
                for fraction in FRACTIONS if axis == axes[0] else FRACTIONS[:-1]:
                    heads = space.heads[-1] if axis == "ffn" else round(fraction * space.heads[-1])
                    net = space.uniform(model, heads, round(fraction * model.ffn_hidden_size))
                    milliseconds, to_dense, to_stock = _compare(ours, model, net)
                    figures = [str(to_dense), f"{to_dense.minima:.3f}", str(to_stock)]
                    rows.append([name, axis, f"{fraction:.0%}", *milliseconds, *figures])
                    if fraction < 1:
                        medians.append(to_dense.median)
                    bar.update()
    print_table(
        "slice",
        ["model", "shrunk", "width", "elastic ms", "dense ms", "stock ms", "elastic / dense", "fastest", "elastic / stock"],
        rows,
    )
    print(
        f"elastic / dense below 100 %: {statistics.median(medians):.3f} (median row), {max(medians):.3f} (highest row)",
        flush=True,
    )


def _compare(ours: torch.nn.Module, model: ModelConfig, net: SubNetwork) -> tuple[list[str], Ratio, Ratio]:
    """Fastest milliseconds of elastic, dense and stock; elastic / dense; elastic / stock."""
    set_subnetwork(ours, net)
    batch = micro_batch(model.vocab_size)
    seconds = interleaved(
        {
            "elastic": forward_backward(ours, batch),
            "dense": forward_backward(dense(model, net), batch),
            "stock": forward_backward(dense(model, net, fully_stock=True), batch, with_mask=True),
        },
        ROUNDS,
    )
    milliseconds = [f"{1000 * min(times):.0f}" for times in seconds.values()]
    return milliseconds, ratio(seconds["elastic"], seconds["dense"]), ratio(seconds["elastic"], seconds["stock"])
