"""Peak memory of import, sorting, importance and export of a 1.1-billion-parameter Llama, and their time over a plain copy."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import print_settings
from flextron_mcore.config import FlextronError
from flextron_mcore.runs.terminal import print_table

NEEDED_BYTES = 10 * 2**30
# Shape of TinyLlama.
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 2048,
    "num_attention_heads": 32,
    "num_hidden_layers": 22,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}
# Program that only imports what the stages import.
_IMPORTS = """
from flextron_mcore.runtime.environment import prepare_environment
prepare_environment()
import flextron_mcore.training.loop, flextron_mcore.exports.hf
"""
# Program that runs its arguments as a command and prints its exit code, peak memory and times. The command must not be a child
# of this process, because the kernel starts a process's peak memory from that of its parent.
MEASURE = """
import json, resource, subprocess, sys, time
begun = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=sys.stderr).returncode
seconds, used = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, used.ru_maxrss * 1024, seconds, used.ru_utime, used.ru_stime]))
"""


@contextlib.contextmanager
def room(benchmark: str, needed: int) -> Iterator[Path]:
    """Temporary directory. Raises FlextronError if fewer than `needed` bytes are free on its disk."""
    with tempfile.TemporaryDirectory(prefix=f"flextron-{benchmark}-") as name:
        free = shutil.disk_usage(name).free
        if free < needed:
            raise FlextronError(
                f"{name}: {needed / 2**30:.0f} GiB needed, {free / 2**30:.1f} GiB free: set TMPDIR to another disk"
            )
        yield Path(name)


def run() -> None:
    """Run the benchmark and print its table."""
    print_settings(
        "stream: peak resident memory of a stage in its own process, and its time / time of a plain copy of the same bytes",
        "random Llama in bf16: 22 layers, hidden 2048, 32 heads in 4 KV groups, FFN 5632, vocabulary 32000 (1.10 billion",
        "parameters); sources are in the page cache (read just before); checkpoints and copies are synced to the disk, the",
        "export is not; copy: mean of one before and one after; 'nothing': a process that only runs the stages' imports",
    )
    with room("stream", NEEDED_BYTES) as folder:
        rows = list(_rows(folder))
    print_table("stream", ["stage", "peak GiB", "seconds", "user", "system", "copy seconds", "stage / copy"], rows)


def _rows(folder: Path):
    python = [sys.executable, "-c"]
    flextron = [sys.executable, "-m", "flextron_mcore"]
    hf, imported, sorted_, data, exported = (folder / name for name in ("hf", "imported", "sorted", "data", "exported"))
    run_command([*python, "from benchmarks.stream import write_llama as f; f(__import__('sys').argv[1])", str(hf)])
    run_command([*flextron, "prepare", "input=builtin", "vocab_size=1024", f"out={data}"])
    yield _row("nothing", [*python, _IMPORTS])
    yield _row("import", [*flextron, "import", f"hf={hf}", f"out={imported}"], hf)
    sort = "from benchmarks.stream import sort as f; f(*__import__('sys').argv[1:])"
    yield _row("sorting alone", [*python, sort, str(imported), str(sorted_)], imported)
    shutil.rmtree(sorted_)
    calibration = ["model.micro_batch_size=1", "samples=4", "model.seq_length=512", "ablation_batches=0"]
    importance = [*flextron, "importance", f"checkpoint={imported}", f"data={data}", f"out={sorted_}", *calibration]
    yield _row("importance (4 x 512 tokens)", importance, imported)
    shutil.rmtree(imported)
    yield _row("export", [*flextron, "export", f"checkpoint={sorted_}", f"out={exported}"], sorted_)


def _row(name: str, command: list[str], source: Path | None = None) -> list[str]:
    """Cells of a row: run a command and time it, and time a copy of the directory `source` that it reads before and after it."""
    copies = [copy_seconds(source)] if source else []
    if source:
        read_files(source)
    print(f"stream: {name} ...", file=sys.stderr, flush=True)
    code, peak, seconds, *processor = json.loads(run_command([sys.executable, "-c", MEASURE, *command]))
    if code:
        raise FlextronError(f"{name}: failed with exit code {code}")
    row = [name, f"{peak / 2**30:.2f}", f"{seconds:.1f}", *(f"{value:.1f}" for value in processor)]
    if source is None:
        return [*row, "-", "-"]
    copies.append(copy_seconds(source))
    copy = sum(copies) / 2
    return [*row, f"{copy:.1f} ({copies[0]:.1f}, {copies[1]:.1f})", f"{seconds / copy:.1f}"]


def run_command(command: list[str]) -> str:
    """Standard output of a command. Raises CalledProcessError if it fails."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def copy_seconds(source: Path) -> float:
    """Seconds to copy the files of a directory and sync them to the disk."""
    read_files(source)
    target = source.parent / "copy"
    begun = time.perf_counter()
    shutil.copytree(source, target)
    for file in target.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened)
    seconds = time.perf_counter() - begun
    shutil.rmtree(target)
    return seconds


def read_files(source: Path) -> None:
    """Bring the files of a directory into the page cache."""
    for file in source.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                while opened.read(2**24):
                    pass


def write_llama(directory: str) -> None:
    """Write a random model of HF_CONFIG as a Hugging Face directory: a file of weights for each layer, and one for the rest."""
    import torch
    from safetensors.torch import save_file

    out, config = Path(directory), HF_CONFIG
    out.mkdir()
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    keys = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    shards = [{"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,), "lm_head": (vocab, hidden)}]
    shards += [{f"model.layers.{i}.{name}": shape for name, shape in layer.items()} for i in range(config["num_hidden_layers"])]
    index, size = {}, 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {f"{name}.weight": torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02) for name, shape in shard.items()}
        save_file(tensors, out / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
        size += sum(tensor.nbytes for tensor in tensors.values())
    (out / "config.json").write_text(json.dumps(config))
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index}))


def sort(checkpoint: str, out: str) -> None:
    """Sort a checkpoint by random scores, and write the result into `out`."""
    from dataclasses import replace

    from flextron_mcore.runtime.environment import prepare_environment

    prepare_environment()
    import torch

    from flextron_mcore.checkpoint.store import open_checkpoint
    from flextron_mcore.checkpoint.writer import write_streaming
    from flextron_mcore.sorting.importance import LayerScores
    from flextron_mcore.sorting.permutation import order, sorted_tensors

    info = open_checkpoint(checkpoint)
    model = info.model
    shape = (model.num_query_groups, model.query_heads_per_group)[: 1 if info.space.attention_unit == "kv_group" else 2]
    units = {"ffn_hidden_size": model.ffn_hidden_size, "heads": shape}
    scores = [LayerScores({axis: torch.rand(size) for axis, size in units.items()}) for _ in range(model.num_layers)]
    orders = {i: order(model, info.space, layer) for i, layer in enumerate(scores)}
    Path(out).mkdir()
    write_streaming(Path(out), replace(info, sorted=True, path=None), sorted_tensors(info, orders))
