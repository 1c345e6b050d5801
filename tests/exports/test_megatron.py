"""format=megatron: Megatron-Core's own GPTModel, built by the exported code, has the logits of the sub-network."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP

from flextron_mcore.axes import AXES
from flextron_mcore.checkpoint.reader import TensorReader
from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.config import FlextronError
from flextron_mcore.exports.cut import cut
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.exports.megatron.arguments import LLAMA3, command_line, not_on_the_command_line
from flextron_mcore.space import ElasticSpace, SubNetwork, count_parameters
from tests import hf_toy, toy
from tests.exports.test_hf import CASES, networks
from tests.toy_axis import AXIS

FORMAT = get_format("megatron")


def exported(info: CheckpointInfo, net: SubNetwork, out: Path, **options) -> dict:
    out.mkdir()
    return FORMAT.write(Job(info, net, out, **options))


def code(out: Path):
    """Python module that the export writes into the directory."""
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
    """Assert that the exported model has these logits, and as many parameters as the export reports."""
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
def test_models_of_no_family_are_the_sub_network(seed, unit, tmp_path):
    """Architectures that no Hugging Face family has, odd sizes, skipped layers, a smaller hidden size."""
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
    """Logits equal those of format=hf, whose tensors test_hf.py compares with the original's."""
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


def test_units_that_stay_in_their_buckets_stay_sorted(tmp_path):
    """Stored tensors are compared one by one, because logits do not depend on the order of units."""
    arch = toy.config(num_attention_heads=16, num_query_groups=16, kv_channels=2, ffn_hidden_size=64)
    space = ElasticSpace.build(arch, 2, "kv_group", [8, 16], [32, 64])
    info = open_checkpoint(toy.write(toy.model(arch, space), CheckpointInfo(arch, space, sorted=True), tmp_path / "run"))
    net = space.uniform(arch, 8, 32)
    exported(info, net, tmp_path / "out")
    dense = open_checkpoint(tmp_path / "out")
    assert (dense.space.granularity, dense.space.attention_unit) == (2, "kv_group")
    reader = TensorReader(dense)
    for name, lazy in cut(info, net).items():
        assert torch.equal(reader.read(name), lazy.load()), name


def test_training_goes_on(tmp_path):
    """The exported stock model trains a step. A uniform export then opens as a checkpoint here and is made elastic again."""
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
    # Units keep their order: half of the exported half is a quarter of the original.
    same = SubNetwork(48, half.layers)
    layer, sizes = half.layers[0], info.space.sizes
    heads, neurons = (layer.num_attention_heads, *sizes["heads"]), (layer.ffn_hidden_size, *sizes["ffn_hidden_size"])
    info = replace(info, space=replace(info.space, sizes={**sizes, "heads": heads, "ffn_hidden_size": neurons}))
    torch.testing.assert_close(hf_toy.logits(hf_toy.megatron(info), same), expected, atol=1e-5, rtol=0)


def _loss(module, gpt: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    scores = module.logits(gpt, tokens)
    return torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize(
    "changes, wanted, unwanted",
    [
        (
            dict(num_query_groups=2, rotary_base=5000.0),
            ["--num-layers 2", "--hidden-size 32", "--num-attention-heads 4", "--group-query-attention", "--num-query-groups 2"]
            + ["--kv-channels 8", "--ffn-hidden-size 48", "--normalization RMSNorm", "--swiglu", "--disable-bias-linear"]
            + ["--untie-embeddings-and-output-weights", "--position-embedding-type rope", "--rotary-base 5000"]
            + ["--max-position-embeddings 24", "--vocab-size 67", "--make-vocab-size-divisible-by 1", "--bf16"],
            ["gelu", "scaling", "interpolation"],
        ),
        (
            dict(toy.GPT2, share_embeddings_and_output_weights=True, activation="gelu"),
            ["--normalization LayerNorm", "--position-embedding-type learned_absolute", "--no-bias-gelu-fusion"],
            ["swiglu", "disable-bias", "untie", "rotary"],
        ),
        (toy.GPT2, ["--untie-embeddings-and-output-weights"], ["gelu"]),  # Megatron-LM's fused GELU is the tanh approximation
        (
            dict(rope_scaling={"type": "linear", "factor": 2.0}, activation="squared-relu"),
            ["--rotary-seq-len-interpolation-factor 2", "--squared-relu"],
            ["swiglu"],
        ),
        (
            dict(rope_scaling={"type": "llama3", "factor": 16.0, **LLAMA3}),
            ["--use-rope-scaling", "--rope-scaling-factor 16.0"],
            ["interpolation"],
        ),
    ],
)
def test_the_arguments_of_megatron_lm_say_the_model(changes, wanted, unwanted):
    arch = toy.config(**changes)
    assert not_on_the_command_line(arch, SubNetwork.full(arch)) is None
    lines = command_line(arch, "bf16").splitlines()
    assert not [line for line in wanted if line not in lines]
    assert not [line for line in lines for word in unwanted if word in line]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(activation="geglu"), "no argument for the activation geglu"),
        (dict(activation="relu"), "no argument for the activation relu"),
        (dict(toy.GPT2, bias=False), "no argument for the activation gelu_tanh without biases"),
        (dict(rotary_base=777.5), "777.5"),
        (dict(rope_scaling={"type": "linear", "factor": 2.5}), "2.5"),
        (dict(rope_scaling={"type": "llama3", "factor": 8.0, **LLAMA3, "low_freq_factor": 2.0}), "the model has others"),
    ],
)
def test_settings_without_an_argument_of_megatron_lm_are_named(changes, message):
    arch = toy.config(**changes)
    assert message in not_on_the_command_line(arch, SubNetwork.full(arch))


def test_the_directory_has_the_files_of_its_kind(tmp_path):
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.llama(), tmp_path / "hf"), tmp_path / "run", dtype="bf16")
    seen = []
    for name, net in networks(info).items():
        out = tmp_path / name.replace(" ", "_")
        exported(replace(info, step=40), net, out, progress=seen.append)
        assert (out / "args.txt").is_file() is net.is_uniform
        assert (out / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "40\n"  # Megatron-LM's tracker file
        common = torch.load(out / "checkpoints" / "iter_0000040" / "common.pt")
        assert common == {"content_metadata": {"non_homogeneous_layers": True}}  # for layers of different sizes
        blocks = json.loads((out / "model_config.json").read_text())["block_configs"]
        assert blocks == (None if net.is_uniform else [
            {"attention": {"num_query_groups": 2, "num_attention_heads": 4}, "mlp": {"ffn_hidden_size": 10}},
            {"attention": {"num_query_groups": 4, "num_attention_heads": 8}, "mlp": {"ffn_hidden_size": 20}},
        ])  # fmt: skip
        card = (out / "README.md").read_text()
        assert ("--pretrained-checkpoint" in card, "the layers have different widths" in card) == (
            net.is_uniform,
            not net.is_uniform,
        )
        assert {p.dtype for p in loaded(out).parameters()} == {torch.float32}
    assert sum(seen) == 2 * sum(count_parameters(info.model, net) for net in networks(info).values())


def test_another_process_reads_the_same_logits(tmp_path, monkeypatch):
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.gpt2(), tmp_path / "hf"), tmp_path / "run")
    net = networks(info)["by layer"]
    exported(info, net, tmp_path / "out")
    job = Job(info, net, tmp_path / "out")
    found = FORMAT.logits(job, net, hf_toy.tokens())
    torch.testing.assert_close(found, hf_toy.logits(hf_toy.megatron(info), net), atol=1e-5, rtol=0)
    monkeypatch.setattr("sys.executable", "false")
    with pytest.raises(FlextronError, match="out: cannot be read back by Megatron-Core: it said nothing"):
        FORMAT.logits(job, net, hf_toy.tokens())


def test_bad_arguments_are_refused(tmp_path):
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.gpt2(), tmp_path / "hf"), tmp_path / "run")
    full = SubNetwork.full(info.model)
    for folder in ("none", "hf"):
        with pytest.raises(FlextronError, match="not an empty directory"):
            FORMAT.write(Job(info, full, tmp_path / folder))
    with pytest.raises(FlextronError, match="hf: no tokenizer in it"):
        exported(info, full, tmp_path / "tokenizer", tokenizer=tmp_path / "hf")
    with pytest.raises(FlextronError, match="not a candidate"):
        exported(info, SubNetwork(32, (full.layers[0], replace(full.layers[0], ffn_hidden_size=39))), tmp_path / "net")
    assert not list((tmp_path / "net").iterdir())


def test_an_added_axis_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(AXES, AXIS.name, AXIS)
    arch = toy.config()
    info = CheckpointInfo(arch, ElasticSpace.build(arch), path=tmp_path / "none")
    with pytest.raises(FlextronError, match="Megatron-Core's own layers have no tensor adapter.down, which an added axis needs"):
        get_format("megatron").write(Job(info, SubNetwork.full(arch), tmp_path / "out"))
