"""ElasticSpace, SubNetwork and parameter counts."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import (
    ElasticSpace,
    LayerChoice,
    SubNetwork,
    count_parameters,
    kv_cache_bytes,
    parameter_share,
    weight_bytes,
)
from tests import toy

LLAMA2_7B = ModelConfig(
    num_layers=32, hidden_size=4096, num_attention_heads=32, ffn_hidden_size=11008, vocab_size=32000, max_position_embeddings=4096
)
LLAMA3_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    num_attention_heads=32,
    num_query_groups=8,
    ffn_hidden_size=14336,
    vocab_size=128256,
    max_position_embeddings=8192,
)


def test_defaults_of_llama2_7b():
    space = ElasticSpace.build(LLAMA2_7B)
    assert (space.granularity, space.attention_unit) == (8, "kv_group")
    assert space.heads == (8, 16, 24, 32) and space.ffn_hidden_size == (2752, 5504, 8256, 11008)
    assert space.hidden_size == (4096,) and space.depth == (32,)


def test_granularity_falls_to_what_divides():
    assert ElasticSpace.build(LLAMA3_8B).granularity == 2  # a quarter of 8 KV groups
    assert ElasticSpace.build(LLAMA3_8B, attention_unit="query_head").granularity == 8
    few = replace(LLAMA3_8B, num_query_groups=2)
    assert ElasticSpace.build(few).attention_unit == "query_head"  # a quarter of 2 KV groups is less than one


def shape(heads: int, groups: int, ffn: int = 64) -> ModelConfig:
    return toy.config(num_attention_heads=heads, num_query_groups=groups, kv_channels=8, ffn_hidden_size=ffn)


@pytest.mark.parametrize(
    "heads, groups, unit, candidates",
    [
        (9, 3, "kv_group", (3, 6, 9)),  # SmolLM2-135M
        (14, 2, "query_head", (4, 8, 10, 14)),  # Qwen2.5-0.5B: whole groups would be 7 and 14 only
        (12, 2, "query_head", (4, 6, 8, 12)),
        (6, 3, "kv_group", (2, 4, 6)),
        (15, 5, "kv_group", (3, 6, 12, 15)),  # SmolLM2-360M
        (5, 5, "kv_group", (1, 2, 4, 5)),
        (3, 1, "query_head", (1, 2, 3)),
        (1, 1, "kv_group", (1,)),
    ],
)
def test_defaults_are_rounded_to_what_divides(heads, groups, unit, candidates):
    space = ElasticSpace.build(shape(heads, groups))
    assert (space.attention_unit, space.heads) == (unit, candidates)
    assert space.ffn_hidden_size == (16, 32, 48, 64)


def test_there_is_always_a_default_space():
    for groups, queries in itertools.product(range(1, 13), range(1, 10)):
        for ffn in (1, 2, 3, 5, 37, 64, 1365, 1536, 2731, 4096):
            arch = shape(groups * queries, groups, ffn)
            space = ElasticSpace.build(arch)
            assert space.heads[-1] == groups * queries and space.ffn_hidden_size[-1] == ffn
            assert len(space.ffn_hidden_size) == min(4, ffn) and len(space.heads) >= min(2, groups * queries)
            for head in space.heads:
                space.check(arch, space.uniform(arch, head))
            assert ElasticSpace.from_dict(arch, space.to_dict()) == space


def test_other_fractions_are_not_rounded():
    with pytest.raises(FlextronError) as error:
        ElasticSpace.build(shape(14, 2), heads=[0.25])
    assert str(error.value) == (
        "space.heads: 0.25 x 14 = 3.5 is not a multiple of 7 (granularity 1 x 7 query heads per KV group); nearest: 7; use 7, 14"
        ", or with space.attention_unit=query_head: 2, 4, 6, 8, 10, 12, 14"
    )


def test_counts_are_those_of_known_models():
    # Figures of the model cards and of the paper's section 4.1 (non-embedding).
    assert count_parameters(LLAMA2_7B) == 6_738_415_616
    assert count_parameters(LLAMA2_7B, embeddings=False) == 6_738_415_616 - 2 * 32000 * 4096
    assert count_parameters(LLAMA3_8B) == 8_030_261_248
    gpt2 = ModelConfig(
        num_layers=12,
        hidden_size=768,
        num_attention_heads=12,
        vocab_size=50257,
        max_position_embeddings=1024,
        activation="gelu_tanh",
        normalization="layernorm",
        bias=True,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=True,
    )
    assert count_parameters(gpt2) == 124_439_808
    assert weight_bytes(gpt2, dtype="fp32") == 4 * 124_439_808
    # 2 (keys and values) x 32 layers x 32 heads x 128 channels x 2 bytes = 512 KiB a token
    assert kv_cache_bytes(LLAMA2_7B, None, batch_size=2, length=4096) == 2 * 4096 * 512 * 1024
    half = ElasticSpace.build(LLAMA2_7B).uniform(LLAMA2_7B, 16, 11008)
    assert kv_cache_bytes(LLAMA2_7B, half, 1, 1, "fp32") == 512 * 1024


def test_hidden_size_and_depth_are_counted():
    arch = toy.config(kv_channels=8)
    full = SubNetwork.full(arch)
    narrow = replace(full, hidden_size=16)
    small = ModelConfig(**{**arch.to_dict(), "hidden_size": 16})
    assert count_parameters(arch, narrow) == count_parameters(small)
    short = replace(full, layers=(full.layers[0], replace(full.layers[1], executed=False)))
    assert count_parameters(arch, short) == count_parameters(ModelConfig(**{**arch.to_dict(), "num_layers": 1}))
    space = ElasticSpace.build(arch, hidden_size=[0.5, 1.0], depth=[1, 2])
    assert space.hidden_size == (16, 32) and space.depth == (1, 2)
    space.check(arch, narrow)
    space.check(arch, short)


def test_the_whole_among_fractions_is_the_full_size():
    assert ElasticSpace.build(LLAMA2_7B, heads=[0.5, 1]).heads == (16, 32)
    assert ElasticSpace.build(LLAMA2_7B, heads=[8, 16]).heads == (8, 16, 32)
    assert ElasticSpace.build(toy.config(), heads=[1]).heads == (1, 4)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(ffn_hidden_size=[0.3]),
            "space.ffn_hidden_size: 0.3 x 11008 = 3302.4 is not a multiple of 8 (granularity 8); nearest: 3296 or 3304",
        ),
        (dict(ffn_hidden_size=[100]), "space.ffn_hidden_size: 100 is not a multiple of 8 (granularity 8); nearest: 96 or 104"),
        (dict(heads=[12]), "space.heads: 12 is not a multiple of 8 (granularity 8); nearest: 8 or 16"),
        (dict(heads=[64]), "space.heads: 64 is not within 1..32"),
        (dict(heads=[0]), "space.heads: 0 is not within 1..32"),
        (dict(heads=[1.5]), "space.heads: 1.5 x 32 = 48 is not within 1..32"),
        (dict(heads=[]), "space.heads must be a list of fractions or sizes, not []"),
        (dict(heads="half"), "space.heads must be a list of fractions or sizes, not 'half'"),
        (dict(heads=["half"]), "space.heads: 'half' is neither a fraction nor a size"),
        (dict(granularity=0), "space.granularity must be a whole number of at least 1, not 0"),
        (
            dict(granularity=3),
            "space.heads: the full size 32 is not a multiple of 3 (granularity 3); choose a smaller space.granularity",
        ),
        (dict(attention_unit="head"), "space.attention_unit='head' is not known: use one of kv_group, query_head"),
        (dict(modulation="yes"), "space.modulation='yes' is neither true nor false"),
        (dict(compensation=1), "space.compensation=1 is neither true nor false"),
        (dict(compensation=True, attention_unit="kv_group"), "space.compensation=true needs space.attention_unit=query_head"),
    ],
)
def test_candidates_that_do_not_fit_are_refused(options, message):
    with pytest.raises(FlextronError) as error:
        ElasticSpace.build(LLAMA2_7B, **{"granularity": 8, "attention_unit": "kv_group", **options})
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


SMOLLM2 = replace(
    LLAMA3_8B, num_layers=30, hidden_size=576, num_attention_heads=9, num_query_groups=3, kv_channels=64, ffn_hidden_size=1536
)


@pytest.mark.parametrize(
    "options, ffn_hidden_size, hidden_size",
    [
        (dict(multiple=256), (512, 768, 1024, 1536), (576,)),
        (dict(multiple=16, hidden_size=[0.5, 0.75]), (384, 768, 1152, 1536), (288, 432, 576)),
        (dict(multiple=100, ffn_hidden_size=[800], hidden_size=[500]), (800, 1536), (500, 576)),
        (dict(multiple=2048), (1536,), (576,)),
        (dict(), (384, 768, 1152, 1536), (576,)),
    ],
)
def test_widths_are_multiples(options, ffn_hidden_size, hidden_size):
    """Default fractions are rounded, the full size stays whatever it is, and heads and layers are not concerned."""
    space = ElasticSpace.build(SMOLLM2, **options)
    assert (space.ffn_hidden_size, space.hidden_size, space.heads, space.depth) == (
        ffn_hidden_size,
        hidden_size,
        (3, 6, 9),
        (30,),
    )
    assert ElasticSpace.from_dict(SMOLLM2, space.to_dict()) == space


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(multiple=256, ffn_hidden_size=[0.25]),
            "space.ffn_hidden_size: 0.25 x 1536 = 384 is not a multiple of 256 (space.multiple 256); nearest: 256 or 512; use "
            "256, 512, 768, 1024, 1280, 1536",
        ),
        (
            dict(multiple=512, hidden_size=[288]),
            "space.hidden_size: 288 is not a multiple of 512 (space.multiple 512); nearest: 512; use 512, 576",
        ),
        (
            dict(multiple=6, granularity=4, ffn_hidden_size=[100], heads=[1.0], attention_unit="query_head"),
            "space.ffn_hidden_size: 100 is not a multiple of 12 (space.multiple 6 and granularity 4); nearest: 96 or 108",
        ),
        (dict(multiple=0), "space.multiple must be a whole number of at least 1, not 0"),
        (dict(multiple=True), "space.multiple must be a whole number of at least 1, not True"),
    ],
)
def test_widths_that_are_no_multiples_are_refused(options, message):
    with pytest.raises(FlextronError) as error:
        ElasticSpace.build(SMOLLM2, **options)
    assert str(error.value).startswith(message)


def test_heads_fall_by_groups_or_by_query_heads():
    with pytest.raises(FlextronError, match="6 is not a multiple of 8 .granularity 2 x 4 query heads per KV group"):
        ElasticSpace.build(LLAMA3_8B, granularity=2, attention_unit="kv_group", heads=[6])
    with pytest.raises(FlextronError, match="12 is not a multiple of 8 .the number of KV groups, 8"):
        ElasticSpace.build(LLAMA3_8B, attention_unit="query_head", heads=[12])
    groups = ElasticSpace.build(LLAMA3_8B, attention_unit="kv_group", heads=[0.5])
    assert groups.layer_choice(LLAMA3_8B, 16, 8) == LayerChoice(True, 4, 4, 8)
    heads = ElasticSpace.build(LLAMA3_8B, attention_unit="query_head", heads=[0.5])
    assert heads.layer_choice(LLAMA3_8B, 16, 8) == LayerChoice(True, 8, 2, 8)


def test_unknown_names_have_a_hint():
    with pytest.raises(FlextronError, match=r"unknown key 'space.ffn_hidden' \(did you mean 'ffn_hidden_size'\?\)"):
        ElasticSpace.from_dict(LLAMA2_7B, {"ffn_hidden": [0.5]})
    with pytest.raises(FlextronError, match=r"unknown model key 'num_layer' \(did you mean 'num_layers'\?\)"):
        ModelConfig.from_dict({"num_layer": 2})
    with pytest.raises(FlextronError, match="model config is incomplete"):
        ModelConfig.from_dict({"num_layers": 2})


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), unit=st.sampled_from(["kv_group", "query_head"]))
def test_a_network_is_read_back_from_json(seed, unit, tmp_path_factory):
    arch = toy.config(num_layers=5, num_query_groups=2)
    space = ElasticSpace.build(arch, attention_unit=unit, heads=[0.5, 1.0])
    net = toy.random_network(arch, space, seed)
    file = tmp_path_factory.mktemp("net") / "net.json"
    file.write_text(net.to_json())
    assert SubNetwork.from_file(file) == net == SubNetwork.from_dict(json.loads(json.dumps(net.to_dict())))
    assert ElasticSpace.from_dict(arch, json.loads(json.dumps(space.to_dict()))) == space
    space.check(arch, net)
    modulated = replace(space, modulation=True)
    assert modulated == space and "modulation" not in space.to_dict()  # so that latency tables and routers fit both spaces
    assert ElasticSpace.from_dict(arch, json.loads(json.dumps(modulated.to_dict()))).modulation
    compensated = replace(ElasticSpace.build(arch, attention_unit="query_head"), compensation=True)
    again = ElasticSpace.from_dict(arch, json.loads(json.dumps(compensated.to_dict())))
    assert again.compensation and not again.modulation and "compensation" not in space.to_dict()
    assert parameter_share(arch, net) == count_parameters(arch, net) / count_parameters(arch) <= 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not readable as JSON"),
        ("[]", "expected an object with 'hidden_size' and a list 'layers'"),
        ('{"hidden_size": 32, "layers": [3]}', r"layers\[0\] is not an object"),
        (
            '{"hidden_size": 32, "layers": [{"executed": true, "kv_groups": 1, "query_heads_per_group": 1}]}',
            "lacks 'ffn_hidden_size'",
        ),
        (
            '{"hidden_size": 32, "layers": [{"executed": true, "kv_group": 1}]}',
            r"unknown key 'kv_group' \(did you mean 'kv_groups'\?\)",
        ),
        (
            '{"hidden_size": 32, "layers": [{"executed": true, "kv_groups": 1.5, "query_heads_per_group": 1,'
            ' "ffn_hidden_size": 8}]}',
            "kv_groups must be of type int, not 1.5",
        ),
        ('{"hidden_size": 32.5, "layers": []}', "hidden_size must be of type int, not 32.5"),
    ],
)
def test_bad_subnetwork_files(tmp_path, text, message):
    file = tmp_path / "net.json"
    file.write_text(text)
    with pytest.raises(FlextronError, match=message) as error:
        SubNetwork.from_file(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_ranking_that_is_none_is_refused():
    arch = toy.config()
    with pytest.raises(FlextronError, match=r"space.layer_ranking=\[0, 0\]: must hold each of the layers 0..1 once"):
        ElasticSpace.build(arch, layer_ranking=[0, 0])


def test_missing_subnetwork_file(tmp_path):
    with pytest.raises(FlextronError, match="none.json: no such file"):
        SubNetwork.from_file(tmp_path / "none.json")


def test_networks_of_another_space_are_refused():
    arch = toy.config()
    space = ElasticSpace.build(arch)
    full = SubNetwork.full(arch)
    change = lambda **values: replace(full, layers=(replace(full.layers[0], **values), full.layers[1]))  # noqa: E731
    with pytest.raises(FlextronError, match=r"net.json: layers\[0\].ffn_hidden_size 20 is not a candidate \[12, 24, 36, 48\]"):
        space.check(arch, change(ffn_hidden_size=20), "net.json")
    with pytest.raises(FlextronError, match=r"layers\[0\] has 2 KV groups x 2 query heads, not a candidate"):
        space.check(arch, change(kv_groups=2, query_heads_per_group=2))
    with pytest.raises(FlextronError, match="1 executed layers are not a candidate"):
        space.check(arch, change(executed=False))
    with pytest.raises(FlextronError, match="hidden_size 16 is not a candidate"):
        space.check(arch, replace(full, hidden_size=16))
    with pytest.raises(FlextronError, match="has 1 layers, the model has 2"):
        space.check(arch, replace(full, layers=full.layers[:1]))


def test_no_torch_import():
    code = "import sys, flextron_mcore.space, flextron_mcore.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
