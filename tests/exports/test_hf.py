"""Hugging Face export: the model that transformers loads has the logits of the sub-network in Megatron-Core.

It also has those of the original model with zeros in the place of unused heads and neurons.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save
from transformers import AutoConfig, AutoModel, AutoTokenizer

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.data.tokenizer import train_tokenizer
from flextron_mcore.exports.formats import Job
from flextron_mcore.exports.hf import write
from flextron_mcore.settings.formats import HfSettings
from flextron_mcore.space import ElasticSpace, LayerChoice, SubNetwork, count_parameters
from tests import hf_toy, toy

GROUPS, QUERIES = {"attention_unit": "kv_group"}, {"attention_unit": "query_head"}
CASES = {
    "llama, groups": (hf_toy.llama, {}, GROUPS),
    "llama, query heads": (hf_toy.llama, {}, QUERIES),
    "llama, mha": (hf_toy.llama, dict(num_key_value_heads=8), GROUPS),
    "llama, tied": (hf_toy.llama, dict(tie_word_embeddings=True), QUERIES),
    "llama, biases": (hf_toy.llama, dict(attention_bias=True, mlp_bias=True), GROUPS),
    "llama, linear": (hf_toy.llama, dict(rope_scaling=hf_toy.LINEAR), GROUPS),
    "llama, llama3": (hf_toy.llama, dict(rope_scaling=hf_toy.LLAMA3, rope_theta=500.0), QUERIES),
    "gpt2": (hf_toy.gpt2, {}, GROUPS),
    "gpt2, untied": (hf_toy.gpt2, dict(tie_word_embeddings=False, activation_function="relu2"), GROUPS),
}


def networks(info: CheckpointInfo) -> dict[str, SubNetwork]:
    """{name: network}: layers of different widths, half the width in every layer, and the full model."""
    space, arch = info.space, info.model
    half = arch.num_attention_heads // 2
    widths = [(half, space.ffn_hidden_size[0]), (arch.num_attention_heads, space.ffn_hidden_size[1])]
    return {
        "by layer": SubNetwork(arch.hidden_size, tuple(space.layer_choice(arch, *width) for width in widths)),
        "uniform": space.uniform(arch, half, space.ffn_hidden_size[1]),
        "full": SubNetwork.full(arch),
    }


def exported(info: CheckpointInfo, net: SubNetwork, out: Path, **options) -> dict:
    out.mkdir()
    return write(Job(info, net, out, **options))


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}
    return found


def greedy(model: torch.nn.Module, prompt: torch.Tensor, cached: bool) -> torch.Tensor:
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=cached, **options)


@pytest.mark.parametrize("case", CASES)
def test_export_is_the_sub_network(case, tmp_path):
    make, options, space = CASES[case]
    theirs = make(**options)
    source = hf_toy.save(theirs, tmp_path / "hf")
    info = hf_toy.checkpoint(source, tmp_path / "run", space)
    assert info.space.granularity > 1  # so units are not in sorted order on disk, but in the export
    model = hf_toy.megatron(info)
    for name, net in networks(info).items():
        out = tmp_path / name.replace(" ", "_")
        figures = exported(info, net, out)
        loaded = hf_toy.load(out)
        expected = hf_toy.logits(hf_toy.masked(theirs, info.model, net))
        assert expected.std() > 0.1
        torch.testing.assert_close(hf_toy.logits(loaded), expected, atol=hf_toy.ATOL, rtol=0, msg=f"{name}: exported")
        torch.testing.assert_close(hf_toy.logits(model, net), expected, atol=hf_toy.ATOL, rtol=0, msg=f"{name}: Megatron-Core")
        # Parameters that count_parameters gives are those written and those loaded. A tied output layer counts once.
        loaded_parameters = sum(p.numel() for p in loaded.parameters())
        assert figures["parameters"] == count_parameters(info.model, net) == loaded_parameters
        stock = name == "full" or (name == "uniform" and "gpt2" not in case)
        assert figures["architecture"] == ("" if stock else "Flextron") + type(theirs).__name__ == type(loaded).__name__
        assert ("reason" in figures, (out / "config.json").read_text().count("auto_map")) == (not stock, not stock)
        assert bool(list(out.glob("*.py"))) is not stock
        assert figures["files"] == len(list(out.iterdir()))
        assert figures["bytes"] == sum(file.stat().st_size for file in out.iterdir())
        prompt = hf_toy.tokens(2, 5)
        assert torch.equal(greedy(loaded, prompt, cached=True), greedy(loaded, prompt, cached=False))
        assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (3, 5)
    original, back = saved_tensors(source), saved_tensors(tmp_path / "full")
    assert original.keys() == back.keys()
    assert all(torch.equal(original[key], back[key]) for key in original)


@pytest.mark.parametrize(
    "style, case",
    [("padded", case) for case in CASES] + [("nemotron_nas", c) for c in CASES if c.startswith("llama") and "bias" not in c],
)
def test_zeros_give_layers_the_widths_that_a_class_needs(style, case, tmp_path):
    """Layers of different widths in a stock class and in DeciLM; sizes follow from config.json by the engines' rules."""
    make, options, space = CASES[case]
    theirs = make(**options)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run", space)
    net = networks(info)["by layer"]
    figures = exported(info, net, tmp_path / "out", settings=HfSettings(style), dtype="fp32")
    loaded = hf_toy.load(tmp_path / "out")
    expected = hf_toy.logits(hf_toy.masked(theirs, info.model, net))
    torch.testing.assert_close(hf_toy.logits(loaded), expected, atol=hf_toy.ATOL, rtol=0)
    prompt = hf_toy.tokens(2, 5)
    assert torch.equal(greedy(loaded, prompt, cached=True), greedy(loaded, prompt, cached=False))
    assert figures["parameters"] == count_parameters(info.model, net) < figures["padded_parameters"]
    assert figures["padded_parameters"] == sum(p.numel() for p in loaded.parameters())
    assert "Zeros that its class needs" in (tmp_path / "out/README.md").read_text()
    if style == "padded":
        assert figures["architecture"] == type(theirs).__name__ == type(loaded).__name__ and not list(
            (tmp_path / "out").glob("*.py")
        )
        return
    config, tensors = json.loads((tmp_path / "out/config.json").read_text()), saved_tensors(tmp_path / "out")
    assert config["architectures"] == ["DeciLMForCausalLM"] and config["model_type"] == "nemotron-nas"
    for i, (block, layer) in enumerate(zip(config["block_configs"], net.layers, strict=True)):
        heads, head, hidden = config["num_attention_heads"], config["head_dim"], config["hidden_size"]
        neurons = int(2 * block["ffn"]["ffn_mult"] * hidden / 3)
        neurons += -neurons % 256
        start, kv = f"model.layers.{i}.", heads // block["attention"]["n_heads_in_group"]
        assert tensors[f"{start}self_attn.q_proj.weight"].shape == (heads * head, hidden)
        assert tensors[f"{start}self_attn.v_proj.weight"].shape == (kv * head, hidden)
        assert tensors[f"{start}mlp.down_proj.weight"].shape == (hidden, neurons)
        assert kv == layer.kv_groups  # the cache is as small as the network's
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["block_configs"] == config["block_configs"]


@pytest.mark.parametrize(
    "style, make, options, heads, words",
    [
        ("nemotron_nas", hf_toy.llama, dict(attention_bias=True, mlp_bias=True), 4, "needs bias=False"),
        ("nemotron_nas", hf_toy.gpt2, {}, 2, "needs normalization=rmsnorm"),
        (
            "padded",
            hf_toy.llama,
            dict(hidden_size=64),
            6,
            "transformers 5 refuses .* not a multiple of its 6 heads: use hf.style",
        ),
    ],
)
def test_a_style_that_cannot_hold_the_model_is_refused(style, make, options, heads, words, tmp_path):
    info = hf_toy.checkpoint(hf_toy.save(make(**options), tmp_path / "hf"), tmp_path / "run", {"heads": [heads]})
    net = info.space.uniform(info.model, heads, info.space.ffn_hidden_size[0])
    (tmp_path / "out").mkdir()
    with pytest.raises(FlextronError, match=words):
        write(Job(info, net, tmp_path / "out", settings=HfSettings(style)))
    assert not list((tmp_path / "out").iterdir())


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_shape_is_the_sub_network(data, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("any")
    theirs, space = hf_toy.any_model(data.draw)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run", space)
    widths = st.tuples(st.sampled_from(info.space.heads), st.sampled_from(info.space.ffn_hidden_size))
    drawn = data.draw(st.lists(widths, min_size=info.model.num_layers, max_size=info.model.num_layers), "widths")
    net = SubNetwork(info.model.hidden_size, tuple(info.space.layer_choice(info.model, *width) for width in drawn))
    expected = hf_toy.logits(hf_toy.masked(theirs, info.model, net))
    figures = exported(info, net, tmp_path / "out")
    loaded = hf_toy.load(tmp_path / "out")
    torch.testing.assert_close(hf_toy.logits(loaded), expected, atol=hf_toy.ATOL, rtol=0)
    torch.testing.assert_close(hf_toy.logits(hf_toy.megatron(info), net), expected, atol=hf_toy.ATOL, rtol=0)
    assert figures["parameters"] == sum(p.numel() for p in loaded.parameters())


def test_a_uniform_llama_that_the_stock_class_refuses(tmp_path):
    theirs = hf_toy.llama(hidden_size=40, num_attention_heads=8, num_key_value_heads=8)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run", {"heads": [6, 8]})
    net = info.space.uniform(info.model, 6, 40)
    figures = exported(info, net, tmp_path / "out")
    assert figures["architecture"] == "FlextronLlamaForCausalLM" and "40" in figures["reason"] and "6 heads" in figures["reason"]
    expected = hf_toy.logits(hf_toy.masked(theirs, info.model, net))
    torch.testing.assert_close(hf_toy.logits(hf_toy.load(tmp_path / "out")), expected, atol=hf_toy.ATOL, rtol=0)


@pytest.mark.parametrize("make", [hf_toy.llama, hf_toy.gpt2])
def test_hidden_size_and_depth(make, tmp_path):
    """Every exported tensor but GPT-2's joint attention matrix is the leading block of the original's."""
    theirs = make()
    source = hf_toy.save(theirs, tmp_path / "hf")
    hidden = theirs.config.hidden_size
    info = hf_toy.checkpoint(source, tmp_path / "run", {"hidden_size": [hidden // 2, hidden], "depth": [1, 2]})
    full = SubNetwork.full(info.model)
    net = SubNetwork(hidden // 2, (replace(full.layers[0], executed=False), full.layers[1]))
    figures = exported(info, net, tmp_path / "out")
    loaded = hf_toy.load(tmp_path / "out")
    assert figures["parameters"] == count_parameters(info.model, net) == sum(p.numel() for p in loaded.parameters())
    original = theirs.state_dict()
    for name, tensor in loaded.state_dict().items():
        whole = original[name.replace(".0.", ".1.", 1) if ".0." in name else name]
        assert torch.equal(tensor, whole[tuple(slice(n) for n in tensor.shape)]), name
    assert hf_toy.logits(loaded).isfinite().all()


def test_the_exported_directory_is_like_any_other(tmp_path):
    """The directory loads as a bare model and with another attention implementation, and can be saved and loaded again."""
    for make in (hf_toy.llama, hf_toy.gpt2):
        name = make.__name__
        info = hf_toy.checkpoint(hf_toy.save(make(), tmp_path / f"{name}_hf"), tmp_path / f"{name}_run")
        out = tmp_path / f"{name}_out"
        exported(info, networks(info)["by layer"], out)
        loaded = hf_toy.load(out)
        expected = hf_toy.logits(loaded)
        loaded.set_attn_implementation("eager")
        torch.testing.assert_close(hf_toy.logits(loaded), expected, atol=hf_toy.ATOL, rtol=0)
        attentions = loaded(hf_toy.tokens(1, 6), output_attentions=True).attentions  # only the eager implementation returns them
        assert [weights.shape[1] for weights in attentions] == loaded.config.num_attention_heads_per_layer
        bare = AutoModel.from_pretrained(out, trust_remote_code=True).eval()
        hidden = loaded(hf_toy.tokens(), output_hidden_states=True).hidden_states
        assert len(hidden) == 3
        torch.testing.assert_close(bare(hf_toy.tokens()).last_hidden_state, hidden[-1], atol=hf_toy.ATOL, rtol=0)
        loaded.save_pretrained(tmp_path / f"{name}_again")
        torch.testing.assert_close(hf_toy.logits(hf_toy.load(tmp_path / f"{name}_again")), expected, atol=hf_toy.ATOL, rtol=0)


def test_the_config_says_where_layers_differ(tmp_path):
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.llama(), tmp_path / "hf"), tmp_path / "run")
    net = networks(info)["by layer"]
    exported(info, net, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["per_layer_config"] == {
        "0": {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 10},
        "1": {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 20},
    }
    assert config["num_attention_heads_per_layer"] == [4, 8]
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]) == (8, 4, 20)
    parsed = AutoConfig.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert [parsed.layer_config(i).intermediate_size for i in range(2)] == [10, 20]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| 0 | 4 | 2 | 10 |" in card and "| 1 | 8 | 4 | 20 |" in card and "trust_remote_code=True" in card
    assert f"{count_parameters(info.model, net):,} parameters" in card


def test_rope_is_written_as_transformers_4_and_5_read_it(tmp_path):
    theirs = hf_toy.llama(rope_scaling=hf_toy.LLAMA3, rope_theta=500.0)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run")
    exported(info, SubNetwork.full(info.model), tmp_path / "scaled")
    config = json.loads((tmp_path / "scaled" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (500.0, hf_toy.LLAMA3)
    assert config["rope_parameters"] == {"rope_theta": 500.0, **hf_toy.LLAMA3}
    exported(replace(info, model=replace(info.model, rope_scaling=None)), SubNetwork.full(info.model), tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (500.0, None)
    assert config["rope_parameters"] == {"rope_theta": 500.0, "rope_type": "default"}


def test_values_that_no_cut_changes_are_those_of_the_original(tmp_path):
    theirs = hf_toy.gpt2(
        activation_function="gelu_pytorch_tanh", layer_norm_epsilon=1e-3, embd_pdrop=0.3, resid_pdrop=0.2, attn_pdrop=0.4
    )
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run")
    exported(info, networks(info)["by layer"], tmp_path / "out")
    back = hf_toy.load(tmp_path / "out").config.to_dict()
    original = theirs.config.to_dict()
    changed = {name for name in original if back.get(name, None) != original[name]}
    assert changed <= {"architectures", "model_type", "n_inner", "_name_or_path", "dtype", "torch_dtype", "transformers_version"}


@pytest.mark.parametrize("bytes_a_shard, least", [(10**9, 1), (30_000, 3), (1, 10)])
def test_weights_are_split_into_shards_of_the_asked_size(bytes_a_shard, least, tmp_path):
    theirs = hf_toy.llama()
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run")
    seen = []
    exported(info, SubNetwork.full(info.model), tmp_path / "out", max_shard_size=bytes_a_shard, progress=seen.append)
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) >= least and sum(seen) == 4 * count_parameters(info.model)
    header = 4096
    assert bytes_a_shard == 1 or max(file.stat().st_size for file in shards) < bytes_a_shard + header
    original, back = saved_tensors(tmp_path / "hf"), saved_tensors(tmp_path / "out")
    assert original.keys() == back.keys() and all(torch.equal(original[key], back[key]) for key in original)
    assert torch.equal(hf_toy.logits(hf_toy.load(tmp_path / "out")), hf_toy.logits(theirs))


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_files_are_those_of_the_safetensors_library(dtype, tmp_path):
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.llama(), tmp_path / "hf"), tmp_path / "run")
    exported(info, networks(info)["uniform"], tmp_path / "out", dtype=dtype, max_shard_size=20_000)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    for file in files:
        assert file.read_bytes() == save(load_file(file), {"format": "pt"})


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_weights_are_stored_in_the_asked_dtype(dtype, tmp_path):
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.gpt2(), tmp_path / "hf"), tmp_path / "run", dtype="bf16")
    exported(info, SubNetwork.full(info.model), tmp_path / "out", dtype=dtype)
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert {tensor.dtype for tensor in saved_tensors(tmp_path / "out").values()} == {wanted}
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == wanted


def test_a_model_that_was_not_imported(tmp_path):
    """Special token ids come from the tokenizer. Without one the config has none: Llama's defaults would be wrong."""
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.llama(vocab_size=300), tmp_path / "hf"), tmp_path / "run")
    info = replace(info, hf_config=None)
    exported(info, SubNetwork.full(info.model), tmp_path / "bare")
    config = AutoConfig.from_pretrained(tmp_path / "bare")
    assert (config.bos_token_id, config.eos_token_id) == (None, None)
    tokenizer = train_tokenizer(["a b c d"], 257)
    tokenizer.save(tmp_path / "run" / "tokenizer")
    exported(info, networks(info)["by layer"], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eod
    opened = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert opened.decode(opened("c a b").input_ids) == "c a b"


def test_layernorm1p_is_written_as_layernorm(tmp_path):
    """layernorm1p stores the scale less 1; the export adds 1, so an import of it has the same logits."""
    theirs = hf_toy.gpt2()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "ln_" in name and name.endswith("weight"):
                parameter.sub_(1)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run")
    info = replace(info, model=replace(info.model, normalization="layernorm1p"))
    exported(info, SubNetwork.full(info.model), tmp_path / "out")
    found, expected = hf_toy.logits(hf_toy.load(tmp_path / "out")), hf_toy.logits(hf_toy.megatron(info))
    torch.testing.assert_close(found, expected, atol=hf_toy.ATOL, rtol=0)


@pytest.mark.parametrize(
    "changes, words",
    [
        (toy.LLAMA | {"activation": "geglu"}, ["Llama needs activation=swiglu (it is geglu)"]),
        (toy.LLAMA | {"normalization": "layernorm"}, ["Llama needs normalization=rmsnorm (it is layernorm)"]),
        (toy.GPT2 | {"bias": False}, ["GPT-2 needs bias=true (it is false)"]),
        (toy.GPT2 | {"num_query_groups": 2}, ["GPT-2 needs num_query_groups=4 (it is 2)"]),
        (toy.GPT2 | {"normalization": "rmsnorm"}, ["GPT-2 needs normalization=layernorm|layernorm1p (it is rmsnorm)", "Llama"]),
    ],
)
def test_models_of_no_family_are_refused(changes, words, tmp_path):
    arch = toy.config(**changes)
    info = CheckpointInfo(arch, ElasticSpace.build(arch, granularity=1, heads=[1.0]), path=tmp_path / "none")
    with pytest.raises(FlextronError) as caught:
        exported(info, SubNetwork.full(arch), tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message and "format=hf" in message
    for word in words:
        assert word in message


def test_bad_arguments_are_refused(tmp_path):
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.gpt2(), tmp_path / "hf"), tmp_path / "run")
    full = SubNetwork.full(info.model)
    with pytest.raises(FlextronError, match="not an empty directory"):
        write(Job(info, full, tmp_path / "none"))
    with pytest.raises(FlextronError, match="not an empty directory"):
        write(Job(info, full, tmp_path / "hf"))
    with pytest.raises(FlextronError, match="hf: no tokenizer in it"):
        exported(info, full, tmp_path / "tokenizer", tokenizer=tmp_path / "hf")
    with pytest.raises(FlextronError, match="not a candidate"):
        exported(info, SubNetwork(32, (LayerChoice(True, 3, 1, 39),) * 2), tmp_path / "net")
