"""Sliding windows in some layers only: the keys of Qwen, SmolLM3 and Ministral, the mask, the KV cache, and every format."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from flextron_mcore.config import FlextronError
from flextron_mcore.cost import memory_cost
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.families import ministral, qwen2, qwen3, smollm3
from flextron_mcore.flops import Costs
from flextron_mcore.space import ElasticSpace, SubNetwork, kv_cache_bytes, weight_bytes
from tests import hf_toy
from tests.families.test_mistral import decoded

FAMILIES = {each.classes: each for each in (qwen2.FAMILY, qwen3.FAMILY, smollm3.FAMILY, ministral.FAMILY)}
SIZES = dict(
    hidden_size=48, intermediate_size=40, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=6,
    vocab_size=hf_toy.VOCAB, max_position_embeddings=hf_toy.LENGTH, bos_token_id=3, eos_token_id=5, pad_token_id=None,
)  # fmt: skip
FULL, WINDOW = "full_attention", "sliding_attention"
SWITCHED = {"use_sliding_window": True, "sliding_window": 7}
OPTIONS = {
    "Qwen2, the last two layers": ("Qwen2", dict(**SWITCHED, max_window_layers=2)),
    "Qwen2, listed": ("Qwen2", dict(**SWITCHED, layer_types=[WINDOW, FULL, WINDOW, FULL])),
    "Qwen3, all layers": ("Qwen3", dict(**SWITCHED, max_window_layers=0)),
    "Qwen3, listed": ("Qwen3", dict(**SWITCHED, layer_types=[FULL, WINDOW, WINDOW, WINDOW])),
    "SmolLM3, layers without rope": ("SmolLM3", dict(**SWITCHED, no_rope_layer_interval=2)),
    "SmolLM3, listed": ("SmolLM3", dict(**SWITCHED, layer_types=[WINDOW, FULL, FULL, WINDOW])),
    "Ministral, listed": ("Ministral", dict(sliding_window=7, layer_types=[FULL, WINDOW, WINDOW, WINDOW])),
}


def model(family: str, **changes) -> PreTrainedModel:
    config = getattr(transformers, f"{family}Config")(**SIZES, **changes)
    return hf_toy._random(getattr(transformers, f"{family}ForCausalLM")(config))


def mixed() -> PreTrainedModel:
    return model(*OPTIONS["Qwen2, listed"][:1], **OPTIONS["Qwen2, listed"][1])


@pytest.mark.parametrize("family, options", OPTIONS.values(), ids=OPTIONS)
def test_logits_are_those_of_transformers(family, options, tmp_path):
    theirs = model(family, **options)
    hf_toy.check_import(theirs, tmp_path)
    plain = model(family, **{**options, "sliding_window": 500})
    plain.load_state_dict(theirs.state_dict())
    assert (hf_toy.logits(theirs) - hf_toy.logits(plain)).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_every_combination_of_keys_is_read_as_transformers_reads_it(family):
    """Absent, null and set keys; combinations that transformers cannot compute are refused."""
    choices = {
        "use_sliding_window": [..., False, True],
        "sliding_window": [..., None, 5],
        "max_window_layers": [..., 0, 1, 4, 9],
        "layer_types": [..., None, [FULL] * 4, [FULL, WINDOW, FULL, WINDOW], [WINDOW] * 4],
    }
    refused = 0
    for values in itertools.product(*choices.values()):
        given = {name: value for name, value in zip(choices, values, strict=True) if value is not ...}
        if family == "Ministral":
            given.pop("use_sliding_window", None)
        theirs = getattr(transformers, f"{family}Config")(**SIZES, **given)
        switched = family == "Ministral" or theirs.use_sliding_window
        impossible = WINDOW in theirs.layer_types and not (switched and theirs.sliding_window)
        try:
            ours = FAMILIES[family].model_config({**SIZES, **given})
        except FlextronError as error:
            assert impossible and "layer_types with sliding_attention needs a window" in str(error), given
            refused += 1
            continue
        expected = tuple(theirs.sliding_window if kind == WINDOW else None for kind in theirs.layer_types)
        assert not impossible and ours.windows == expected, given
    assert refused


@torch.no_grad()
def test_decoding_with_a_cache_sees_the_windows(tmp_path):
    info = hf_toy.checkpoint(hf_toy.save(mixed(), tmp_path / "hf"), tmp_path / "run")
    ours = hf_toy.megatron(info)
    for net in (None, info.space.uniform(info.model, 4, 20)):
        whole, stepwise = decoded(ours, net)
        torch.testing.assert_close(stepwise, whole, atol=hf_toy.ATOL, rtol=0)


def test_layers_keep_their_windows_when_others_are_skipped(tmp_path):
    """Networks of different widths and depths, each generated with a KV cache and without: the text of the masked original."""
    theirs = mixed()
    space = {"depth": [1, 2, 3, 4], "layer_ranking": [2, 1, 0, 3]}
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run", space)
    prompt = hf_toy.tokens(2, 5)
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    elastic = exported(Job(info, SubNetwork.full(info.model), tmp_path / "hf_elastic"), "hf_elastic")
    for depth, widths in ((2, (4, 4, 4, 4)), (3, (4, 8, 4, 8))):
        layers = tuple(info.space.layer_choice(info.model, heads, 20) for heads in widths)
        net = info.space.network(info.model, layers, 48, depth)
        oracle = hf_toy.masked(theirs, info.model, net)
        expected = oracle.generate(prompt, use_cache=False, **options)
        cut = exported(Job(info, net, tmp_path / f"hf_{depth}"), "hf")
        elastic.set_subnetwork(net.to_dict())
        for loaded in (cut, elastic):
            torch.testing.assert_close(hf_toy.logits(loaded), hf_toy.logits(oracle), atol=hf_toy.ATOL, rtol=0)
            for cached in (True, False):
                assert torch.equal(loaded.generate(prompt, use_cache=cached, **options), expected)


def exported(job: Job, name: str) -> PreTrainedModel:
    job.out.mkdir()
    get_format(name).write(job)
    return hf_toy.load(job.out)


def test_a_ministral_without_windows_is_one_that_transformers_loads(tmp_path):
    """transformers' class wants a number of tokens even where no layer has a window."""
    theirs = model("Ministral", sliding_window=7, layer_types=[FULL] * 4)
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run")
    assert info.model.sliding_window is None
    loaded = exported(Job(info, SubNetwork.full(info.model), tmp_path / "out"), "hf")
    assert type(loaded).__name__ == "MinistralForCausalLM"
    torch.testing.assert_close(hf_toy.logits(loaded), hf_toy.logits(theirs), atol=hf_toy.ATOL, rtol=0)


def test_formats_without_windows_refuse_the_model_by_name(tmp_path):
    info = hf_toy.checkpoint(hf_toy.save(mixed(), tmp_path / "hf"), tmp_path / "run")
    (tmp_path / "out").mkdir()
    for name, words in {"gguf": "needs sliding_window=null", "trtllm": "no sliding window, this model has one of 7"}.items():
        with pytest.raises(FlextronError, match=f"format={name}: .*{words}"):
            get_format(name).write(Job(info, SubNetwork.full(info.model), tmp_path / "out"))
    assert not list(Path(tmp_path / "out").iterdir())


def test_cache_and_operations_are_those_of_each_layer():
    arch = qwen2.FAMILY.model_config({**SIZES, **SWITCHED, "layer_types": [FULL, FULL, FULL, WINDOW]})
    full = SubNetwork.full(arch)
    per_token = 2 * 4 * 6 * 2  # key and value, groups, channels, bytes
    assert kv_cache_bytes(arch, full, 3, 90) == 3 * per_token * (3 * 90 + 7)
    space = ElasticSpace.build(
        arch, granularity=1, heads=[2, 4, 8], ffn_hidden_size=[20, 40], depth=[1, 4], layer_ranking=[3, 0, 1, 2]
    )
    costs, all_full = Costs(arch, space, 90), qwen2.FAMILY.model_config(SIZES)
    layer = full.layers[0]
    plain = Costs(all_full, space, 90).layer(layer)
    windowed = plain - 4 * 8 * 6 * (90 / 2 - 7 * (1 - 7 / 180))
    assert costs.layer(layer, number=0) == plain and costs.layer(layer, number=3) == pytest.approx(windowed)
    assert costs.full == pytest.approx(Costs(all_full, space, 90).full - (plain - windowed))


def test_memory_budgets_never_count_too_little():
    """Memory budgets count a layer with a window like one without, because a cost has one value for all layers."""
    for types in ([FULL, FULL, FULL, WINDOW], [WINDOW, FULL, FULL, FULL]):
        arch = qwen2.FAMILY.model_config({**SIZES, **SWITCHED, "layer_types": types})
        space = ElasticSpace.build(arch, granularity=1, depth=[1, 4], layer_ranking=[3, 0, 1, 2])
        for length in (5, 90):
            cost = memory_cost(arch, space, "bf16", 3, length)
            for net in (SubNetwork.full(arch), space.uniform(arch, 4, 20, None, 1)):
                exact = weight_bytes(arch, net) + kv_cache_bytes(arch, net, 3, length)
                assert cost.of(net) == exact if length <= 7 else cost.of(net) >= exact


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "changes, words",
    [
        ({"layer_types": [FULL, WINDOW]}, ["layer_types of length 2 is not supported", "each of the 4 layers"]),
        ({"layer_types": [FULL, "chunked_attention", FULL, FULL]}, ["layer_types with chunked_attention is not supported"]),
        ({"layer_types": [FULL, WINDOW] * 2, "sliding_window": None}, ["needs a window", "use_sliding_window to true"]),
        ({"layer_types": None, "sliding_window": 0}, ["model.sliding_window must be a whole number of at least 1, not 0"]),
        ({"sliding_window": "many"}, ["sliding_window must be a whole number, not 'many'"]),
    ],
)
def test_unsupported_options_are_one_clear_line(changes, words, family, tmp_path):
    options = SWITCHED if family != "Ministral" else {"sliding_window": 7}
    theirs = model(family, **options, layer_types=[FULL, WINDOW, WINDOW, WINDOW])
    config = json.loads((hf_toy.save(theirs, tmp_path) / "config.json").read_text())
    if family.startswith("Qwen"):
        changes = {"max_window_layers": 2, **changes}
    hf_toy.check_refusal(config | changes, tmp_path, words)
