"""Decoding time of sub-networks in llama.cpp over the full model's, measured and predicted by a latency table."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks import interleaved, print_settings, ratio
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.runs.terminal import print_table

PROMPT, GENERATED, ROUNDS, FITTED = 8, 32, 9, 28
MODEL = ModelConfig(
    num_layers=6, hidden_size=1024, num_attention_heads=16, ffn_hidden_size=2816, vocab_size=4096, max_position_embeddings=256
)


def run() -> None:
    """Run the benchmark and print its table. The latency table is fitted to other networks than it predicts."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise FlextronError("llama_cpp: is not installed: run make setup-llama-cpp")
    from benchmarks.export import random_run
    from flextron_mcore.checkpoint.store import open_checkpoint
    from flextron_mcore.exports.formats import Job, get_format
    from flextron_mcore.latency.table import check_errors, fit
    from flextron_mcore.runtime import distributed
    from flextron_mcore.space import ElasticSpace, SubNetwork, count_parameters
    from flextron_mcore.training.sampler import draw

    distributed.initialize()
    print_settings(
        f"llama_cpp: {GENERATED} tokens after a prompt of {PROMPT}, one at a time, in llama.cpp",
        f"random Llama: {MODEL.num_layers} layers, hidden {MODEL.hidden_size}, {MODEL.num_attention_heads} heads, FFN "
        f"{MODEL.ffn_hidden_size}, vocabulary {MODEL.vocab_size}; f16, 1 thread",
        f"time / full: median (quartiles) of {ROUNDS} paired rounds; ms: the fastest; table: fitted to {FITTED} others",
    )
    space = ElasticSpace.build(MODEL)
    asked = {"full": SubNetwork.full(MODEL)}
    for share in (0.25, 0.5, 0.75):
        heads, width = (round(size * share) for size in (MODEL.num_attention_heads, MODEL.ffn_hidden_size))
        asked[f"{share:g} of heads and neurons"] = space.uniform(MODEL, heads, width)
    asked["mixed"], *others = draw(MODEL, space, 1, 0, FITTED + 1)
    networks = {**asked, **{f"other {i}": net for i, net in enumerate(others)}}
    with tempfile.TemporaryDirectory(prefix="flextron-llama-") as name:
        random_run(Path(name, "run"), MODEL, space)
        info = open_checkpoint(Path(name, "run"))
        loaded = {}
        for i, (label, net) in enumerate(networks.items()):
            out = Path(name, str(i))
            out.mkdir()
            get_format("gguf").write(Job(info, net, out))
            loaded[label] = _decoding(out / "model.gguf")
        seconds = interleaved(loaded, ROUNDS)
    ms = {label: 1000 * min(values) / GENERATED for label, values in seconds.items()}
    table = fit(MODEL, space, [(net, ms[f"other {i}"]) for i, net in enumerate(others)], {}, {}).cost()
    rows = []
    for label, net in asked.items():
        found = ratio(seconds[label], seconds["full"])
        share = count_parameters(MODEL, net) / count_parameters(MODEL)
        rows.append(
            [label, f"{share:.3f}", f"{ms[label]:.2f}", str(found), f"{table.of(net):.2f}", f"{table.of(net) / table.full:.3f}"]
        )
    columns = ["network", "parameters / full", "ms a token", "time / full", "table: ms", "table: / full"]
    print_table("llama_cpp", columns, rows)
    errors = check_errors(table, [(net, ms[label]) for label, net in asked.items()])
    print(
        f"error of the table for these networks: {errors['median_error']:.1%} (median), {errors['largest_error']:.1%} (largest)"
    )


def _decoding(file: Path) -> Callable[[], None]:
    import llama_cpp

    model = llama_cpp.Llama(str(file), n_ctx=MODEL.max_position_embeddings, n_threads=1, n_threads_batch=1, verbose=False)

    def decode() -> None:
        model.reset()
        model.eval(list(range(PROMPT)))
        for token in range(GENERATED):
            model.eval([token])

    return decode
