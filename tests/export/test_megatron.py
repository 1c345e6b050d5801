"""The megatron format: Megatron-Core's own GPTModel, built by the code in the directory, computes the sub-network."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.export.formats import Job, get_format
from flextron_mcore.model import use_subnetwork
from flextron_mcore.space import ElasticSpace, SubNetwork, count_parameters
from tests import hf_toy, toy
from tests.export.test_hf import CASES, networks

FORMAT = get_format("megatron")


def exported(info: CheckpointInfo, net: SubNetwork, out: Path, **options) -> dict:
    out.mkdir()
    return FORMAT.write(Job(info, net, out, **options))


def code(out: Path):
    """The directory's own module."""
    spec = importlib.util.spec_from_file_location("load_model", out / "load_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded(out: Path) -> GPTModel:
    gpt = code(out).load(use_cpu_initialization=True)
    kinds = {type(layer.self_attention) for layer in gpt.decoder.layers} | {type(layer.mlp) for layer in gpt.decoder.layers}
    assert type(gpt) is GPTModel and kinds == {SelfAttention, MLP}
    return gpt


@torch.no_grad()
def check(out: Path, figures: dict, tokens: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    """The directory holds a model with these logits, and the parameters that the export reports."""
    gpt = loaded(out).eval()
    torch.testing.assert_close(code(out).logits(gpt, tokens), expected, atol=1e-5, rtol=0, msg=what)
    assert figures["parameters"] == sum(p.numel() for p in gpt.parameters())


@pytest.mark.parametrize("case", CASES)
def test_a_stock_model_computes_the_sub_network(case, tmp_path):
    make, options, space = CASES[case]
    theirs = make(**options)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run", space)
    nets = networks(info)
    heads = info.model.num_attention_heads
    narrow, full = (info.space.layer_choice(info.model, heads, size) for size in (info.space.ffn_hidden_size[0], 40))
    nets["by FFN"] = SubNetwork(info.model.hidden_size, (full, narrow))
    for name, net in nets.items():
        out = tmp_path / name.replace(" ", "_")
        figures = exported(info, net, out)
        expected = hf_toy.logits(hf_toy.masked(theirs, info.model, net))
        check(out, figures, hf_toy.tokens(), expected, f"{name} of {case}")
        assert figures["parameters"] == count_parameters(info.model, net)
        kind = {"by layer": " with PerLayerConfig", "by FFN": " with HeterogeneousTransformerConfig"}.get(name, "")
        assert figures["architecture"] == f"GPTModel{kind}"
        assert ("reason" in figures) is not net.is_uniform
        files = [file for file in out.rglob("*") if file.is_file()]
        assert (figures["files"], figures["bytes"]) == (len(files), sum(file.stat().st_size for file in files))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
def test_other_models(seed, unit, tmp_path):
    """Kinds that no Hugging Face family has, odd sizes, skipped layers, a smaller hidden size."""
    kinds = [
        dict(activation="geglu", rope_scaling={"type": "linear", "factor": 2.5}),
        dict(activation="squared-relu", normalization="layernorm1p", hidden_size=30, num_attention_heads=6, kv_channels=6),
        dict(activation="relu", bias=True, rotary_base=777.5, share_embeddings_and_output_weights=True),
        dict(toy.GPT2, bias=False, num_query_groups=1),
        dict(toy.GPT2, normalization="layernorm1p", activation="gelu", kv_channels=5),
        dict(rope_scaling={"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                           "original_max_position_embeddings": 8192}, num_query_groups=4, num_attention_heads=8),
    ]  # fmt: skip
    arch = toy.config(**{"num_query_groups": 2, "num_layers": 3, "ffn_hidden_size": 42, **kinds[seed]})
    step = arch.query_heads_per_group if unit == "kv_group" else arch.num_query_groups
    heads = list(range(step, arch.num_attention_heads + 1, step))
    space = ElasticSpace.build(arch, 1, unit, heads, [1, 7, 40, 42])
    model = toy.model(arch, space, seed)
    net = toy.random_network(arch, space, seed)
    tokens, positions = toy.inputs()
    with torch.no_grad(), use_subnetwork(model, net):
        expected = model(tokens, positions, None)
    info = CheckpointInfo(arch, space)
    info = open_checkpoint(toy.write(model, info, tmp_path / "run"))
    figures = exported(info, net, tmp_path / "out")
    check(tmp_path / "out", figures, tokens, expected)
    assert figures["parameters"] == count_parameters(arch, net)


@pytest.mark.parametrize("make", [hf_toy.llama, hf_toy.gpt2])
def test_hidden_size_and_depth(make, tmp_path):
    """Against the hf format, whose tensors test_hf.py compares with the original's."""
    theirs = make(num_hidden_layers=3) if make is hf_toy.llama else make(n_layer=3)
    hidden = theirs.config.hidden_size
    space = {"hidden_size": [hidden // 2, hidden], "depth": [1, 2, 3]}
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run", space)
    choice = info.space.layer_choice(info.model, info.space.heads[0], info.space.ffn_hidden_size[1])
    other = info.space.layer_choice(info.model, info.space.heads[-1], info.space.ffn_hidden_size[0])
    net = SubNetwork(hidden // 2, (choice, replace(other, executed=False), other))
    (tmp_path / "as_hf").mkdir()
    get_format("hf").write(Job(info, net, tmp_path / "as_hf"))
    expected = hf_toy.logits(hf_toy.load(tmp_path / "as_hf"))
    check(tmp_path / "out", exported(info, net, tmp_path / "out"), hf_toy.tokens(), expected)


def test_training_goes_on(tmp_path):
    """A step of gradient in the stock model, and again in flextron: a uniform network is a checkpoint to make elastic again."""
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.llama(), tmp_path / "hf"), tmp_path / "run")
    nets = networks(info)
    tokens = hf_toy.tokens()
    for name in ("uniform", "by layer"):
        out = tmp_path / name.replace(" ", "_")
        exported(info, nets[name], out)
        gpt = loaded(out).train()
        loss = [_loss(code(out), gpt, tokens)]
        loss[0].backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gpt.parameters())
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter -= 0.003 * parameter.grad
        assert _loss(code(out), gpt, tokens) < loss[0]
    with pytest.raises(FlextronError, match="flextron.json is missing"):
        open_checkpoint(tmp_path / "by_layer" / "checkpoints" / "iter_0000001")
    again = open_checkpoint(tmp_path / "uniform")
    assert (again.model.num_attention_heads, again.model.num_query_groups, again.model.ffn_hidden_size) == (4, 2, 20)
    half = again.space.uniform(again.model, again.space.heads[0], again.space.ffn_hidden_size[0])
    figures = exported(again, half, tmp_path / "half")
    expected = hf_toy.logits(hf_toy.megatron(again), half)
    check(tmp_path / "half", figures, tokens, expected)
    # The half of the half is that of the whole: units keep their order.
    same = SubNetwork(48, half.layers)
    info = replace(
        info,
        space=replace(
            info.space,
            heads=(half.layers[0].num_attention_heads, *info.space.heads),
            ffn_hidden_size=(half.layers[0].ffn_hidden_size, *info.space.ffn_hidden_size),
        ),
    )
    torch.testing.assert_close(hf_toy.logits(hf_toy.megatron(info), same), expected, atol=1e-5, rtol=0)


def _loss(module, gpt: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    scores = module.logits(gpt, tokens)
    return torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
