"""GGUF export: the file, read back here and run in llama.cpp, has the logits of the sub-network in Megatron-Core."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.exports import gguf as export
from flextron_mcore.exports import hf
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.settings.formats import GgufSettings
from flextron_mcore.space import ElasticSpace, SubNetwork, count_parameters
from tests import hf_toy, toy
from tests.exports.test_hf import CASES, networks

LLAMAS = [name for name in CASES if name.startswith("llama")]
# Largest difference of logits, relative to their standard deviation: llama.cpp rounds activations, too.
ENGINE = {"f16": 0.02, "q8_0": 0.5}


def exported(info: CheckpointInfo, net: SubNetwork, out: Path, kind: str | None = None, **options) -> Job:
    out.mkdir()
    job = Job(info, net, out, settings=GgufSettings(kind), **options)
    figures = export.write(job)
    assert figures["parameters"] == count_parameters(info.model, net)
    assert figures["files"] == len(list(out.iterdir())) == 2
    assert figures["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    return job


def read(job: Job) -> torch.Tensor:
    return export.logits(job, job.net, hf_toy.tokens())


def same(found: torch.Tensor, expected: torch.Tensor, atol: float = hf_toy.ATOL) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("case", LLAMAS)
def test_read_back_is_the_sub_network(case, tmp_path):
    make, options, space = CASES[case]
    theirs = make(**options)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run", space)
    model = hf_toy.megatron(info)
    for name, net in networks(info).items():
        expected = hf_toy.logits(model, net)
        same(hf_toy.logits(hf_toy.masked(theirs, info.model, net)), expected)
        for kind in ("f32", "f16", "q8_0"):
            job = exported(info, net, tmp_path / f"{name} {kind}".replace(" ", "_"), kind)
            difference = (read(job) - expected).abs().max()
            assert difference < (hf_toy.ATOL if kind == "f32" else export.tolerance(job))
            assert kind == "f32" or difference > 1e-4  # rounded weights give other logits


@pytest.mark.parametrize("case", LLAMAS)
def test_llama_cpp_computes_the_sub_network(case, engine, tmp_path):
    """Logits and 32 decoded tokens are those of transformers with the Hugging Face export of the same network."""
    make, options, space = CASES[case]
    info = hf_toy.checkpoint(hf_toy.save(make(**options), tmp_path / "hf"), tmp_path / "run", space)
    for name, net in networks(info).items():
        job = exported(info, net, tmp_path / name.replace(" ", "_"))
        (tmp_path / f"{name}_hf").mkdir()
        hf.write(Job(info, net, tmp_path / f"{name}_hf"))
        loaded = hf_toy.load(tmp_path / f"{name}_hf")
        running = engine(job.out / "model.gguf")
        same(running.logits(hf_toy.tokens()), hf_toy.logits(loaded))
        prompt = hf_toy.tokens(1, 8)
        greedy = dict(max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0)
        text = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)[0, 8:]
        assert running.greedy(prompt[0].tolist(), 32) == text.tolist()


def random_case(seed: int, folder: Path) -> tuple[CheckpointInfo, SubNetwork]:
    """Random Llama, and one of its networks: random widths, sometimes a smaller hidden size and a skipped layer."""
    draw = random.Random(seed)
    groups, queries, layers = draw.randint(1, 4), draw.randint(1, 4), draw.randint(2, 4)
    unit, hidden = draw.choice(["kv_group", "query_head"]), 2 * groups * queries * draw.randint(2, 4)
    scaling = draw.choice([None, None, hf_toy.LINEAR, hf_toy.LLAMA3])
    biased = draw.random() < 0.3
    theirs = hf_toy.llama(
        hidden_size=hidden,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=groups * queries,
        num_key_value_heads=groups,
        head_dim=draw.choice([6, 8, 16, 32]),
        tie_word_embeddings=draw.random() < 0.5,
        attention_bias=biased,
        mlp_bias=biased,
        rope_theta=draw.choice([500.0, 10000.0]),
        rope_scaling=scaling,
    )
    step = queries if unit == "kv_group" else groups
    space = {
        "granularity": 1,
        "attention_unit": unit,
        "heads": list(range(step, groups * queries + 1, step)),
        "ffn_hidden_size": [1, 31, 64, 96],
        "hidden_size": [hidden // 2, hidden],
        "depth": [layers - 1, layers],
    }
    info = hf_toy.checkpoint(hf_toy.save(theirs, folder / "hf"), folder / "run", space)
    chosen = [
        info.space.layer_choice(info.model, draw.choice(info.space.heads), draw.choice([1, 31, 64, 96])) for _ in range(layers)
    ]
    if draw.random() < 0.5:
        skipped = draw.randrange(layers)
        chosen[skipped] = replace(chosen[skipped], executed=False)
    return info, SubNetwork(draw.choice([hidden // 2, hidden]), tuple(chosen))


@pytest.mark.parametrize("seed", range(10))
def test_any_network_is_the_sub_network(seed, tmp_path, request):
    info, net = random_case(seed, tmp_path)
    (tmp_path / "out").mkdir()
    hf.write(Job(info, net, tmp_path / "out"))
    theirs = hf_toy.load(tmp_path / "out")
    expected = hf_toy.logits(theirs)
    # The sub-network is computed in Megatron-Core where hidden size and depth are the full ones.
    if net.hidden_size == info.model.hidden_size and all(layer.executed for layer in net.layers):
        same(expected, hf_toy.logits(hf_toy.megatron(info), net), 1e-4)
    jobs = {kind: exported(info, net, tmp_path / kind, kind) for kind in ("f32", "f16", "q8_0")}
    # Rounding grows with the logits. Without AVX-512, transformers in fp32 is itself 1.7e-5 off fp64 for seed 0.
    rounding = (expected - hf_toy.logits(theirs.double())).abs().max().item()
    atol = max(hf_toy.ATOL * max(1.0, expected.std().item()), 4 * rounding)
    same(read(jobs["f32"]), expected, atol)
    for kind in ("f16", "q8_0"):
        assert (read(jobs[kind]) - expected).abs().max() < export.tolerance(jobs[kind])
    engine = request.getfixturevalue("engine")
    same(engine(jobs["f32"].out / "model.gguf").logits(hf_toy.tokens()), expected, atol)
    for kind, part in ENGINE.items():
        found = engine(jobs[kind].out / "model.gguf").logits(hf_toy.tokens())
        assert (found - expected).abs().max() < part * expected.std(), kind


def test_types_by_default(tmp_path):
    """Matrices are f32 in an fp32 export, else f16. q8_0 leaves rows that are no multiple of 32 in f16. Vectors are f32."""
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.llama(hidden_size=32), tmp_path / "hf"), tmp_path / "run", dtype="bf16")
    net = SubNetwork.full(info.model)

    def types(name: str, **options) -> dict[str, str]:
        job = exported(info, net, tmp_path / name, **options)
        return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(job.out / "model.gguf").tensors}

    assert set(types("stored").values()) == {"F16", "F32"}
    assert set(types("fp32", dtype="fp32").values()) == {"F32"}
    found = types("q8_0", kind="q8_0")
    assert found["blk.0.ffn_up.weight"] == found["output.weight"] == "Q8_0" and found["blk.0.ffn_down.weight"] == "F16"
    assert {kind for name, kind in found.items() if "norm" in name} == {"F32"}


def test_a_network_without_a_tokenizer_and_its_card(engine, tmp_path):
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.llama(), tmp_path / "hf"), tmp_path / "run")
    seen = []
    job = exported(info, networks(info)["by layer"], tmp_path / "out", progress=seen.append)
    size = (job.out / "model.gguf").stat().st_size
    assert size - 4096 < sum(seen) < size
    card = (job.out / "README.md").read_text()
    assert "| 0 | 4 | 2 | 10 |" in card and "| 1 | 8 | 4 | 20 |" in card and "No tokenizer" in card and f"{size:,} bytes" in card
    assert engine(job.out / "model.gguf").model.n_vocab() == hf_toy.VOCAB


def test_networks_that_gguf_cannot_hold_are_refused(tmp_path, monkeypatch):
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.llama(), tmp_path / "hf"), tmp_path / "run")
    gpt2 = hf_toy.checkpoint(hf_toy.save(hf_toy.gpt2(), tmp_path / "gpt2"), tmp_path / "gpt2_run")
    with pytest.raises(FlextronError, match=r"layers as Llama has them, .*normalization=rmsnorm.*: use format=hf$") as error:
        exported(gpt2, SubNetwork.full(gpt2.model), tmp_path / "a")
    assert "\n" not in str(error.value)
    full = SubNetwork.full(info.model)
    with pytest.raises(FlextronError, match="dtype=bf16 and gguf.type=f16 both set how weights are stored"):
        exported(info, full, tmp_path / "c", "f16", dtype="bf16")
    with pytest.raises(FlextronError, match="not an empty directory"):
        export.write(Job(info, full, tmp_path / "hf"))
    with pytest.raises(FlextronError, match="not a candidate"):
        exported(info, replace(full, hidden_size=32), tmp_path / "d")
    large = hf_toy.llama()
    large.model.layers[1].mlp.down_proj.weight.data[3, 5] = -1e6
    large = hf_toy.checkpoint(hf_toy.save(large, tmp_path / "large"), tmp_path / "large_run")
    with pytest.raises(
        FlextronError,
        match=r"blk.1.ffn_down.weight has a weight of 1e\+06, more than f16 holds \(65504\): use `.* gguf.type=f32`",
    ):
        exported(large, full, tmp_path / "e", "f16")
    assert not list((tmp_path / "e").iterdir())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FlextronError, match=r"needs the Python package gguf: pip install 'flextron_mcore\[gguf\]'"):
        exported(info, full, tmp_path / "f")


def test_damaged_files_and_full_disks_are_one_line(tmp_path, make_disk, monkeypatch):
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.llama(intermediate_size=4096), tmp_path / "hf"), tmp_path / "run")
    job = exported(info, SubNetwork.full(info.model), tmp_path / "out")
    whole = (job.out / "model.gguf").read_bytes()
    for content in (b"", b"GG", whole[:50], whole[:1000], whole[: len(whole) // 2], b"x" * 100):
        (job.out / "model.gguf").write_bytes(content)
        with pytest.raises(FlextronError, match=r"model.gguf: not readable as GGUF") as error:
            read(job)
        assert "\n" not in str(error.value)
    disk = make_disk("1m")
    with pytest.raises(FlextronError, match=r"cannot be written: .* needed, .* free"):
        exported(info, SubNetwork.full(info.model), disk / "out")
    monkeypatch.setattr("flextron_mcore.exports.gguf.writer.check_space", lambda *args: None)
    with pytest.raises(FlextronError, match="cannot be written: No space left on device") as error:
        exported(info, SubNetwork.full(info.model), disk / "again")
    assert "\n" not in str(error.value) and not list((disk / "again").iterdir())


def test_models_of_no_family_are_refused(tmp_path):
    arch = toy.config(**toy.LLAMA | {"activation": "geglu"})
    info = CheckpointInfo(arch, ElasticSpace.build(arch, granularity=1, heads=[1.0]), path=tmp_path / "none")
    with pytest.raises(FlextronError, match=r"activation=swiglu \(it is geglu\)"):
        exported(info, SubNetwork.full(arch), tmp_path / "out")
    assert get_format("gguf") is export.FORMAT
