"""format=hf_elastic: every sub-network of one directory has the checkpoint's logits; weights and KV cache are shared."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choices import Choices
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.config import FlextronError
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.layers.tokens.layer import FixedLevels
from flextron_mcore.settings.formats import HfElasticSettings
from flextron_mcore.settings.sections import KV_POLICIES
from flextron_mcore.space import SubNetwork, count_parameters
from tests import hf_toy, toy
from tests.exports.test_hf import CASES

FORMAT = get_format("hf_elastic")
SPACE = {"heads": [0.25, 0.5, 0.75, 1.0], "ffn_hidden_size": [10, 20, 30, 40], "granularity": 1}


@dataclass(frozen=True)
class Case:
    """One model three times: Hugging Face's stock class, Megatron-Core, and the loaded elastic directory."""

    theirs: PreTrainedModel
    info: CheckpointInfo
    megatron: torch.nn.Module
    folder: Path
    model: PreTrainedModel


def write(info: CheckpointInfo, out: Path, **options) -> dict:
    out.mkdir()
    return FORMAT.write(Job(info, SubNetwork.full(info.model), out, **options))


DEEP_SPACE = {"hidden_size": [0.5, 0.75, 1.0], "depth": [1, 2, 3], "layer_ranking": [1, 2, 0]}
KV_GROUP, QUERY_HEAD = {"attention_unit": "kv_group"}, {"attention_unit": "query_head"}
DEEP = {  # all axes are elastic
    "deep llama": (hf_toy.llama, {"num_hidden_layers": 3}, {**KV_GROUP, **DEEP_SPACE}),
    "deep llama, tied": (hf_toy.llama, {"num_hidden_layers": 3, "tie_word_embeddings": True}, {**KV_GROUP, **DEEP_SPACE}),
    "deep llama, query heads": (hf_toy.llama, {"num_hidden_layers": 3}, {**QUERY_HEAD, **DEEP_SPACE}),
    "deep gpt2": (hf_toy.gpt2, {"n_layer": 3}, {**KV_GROUP, **DEEP_SPACE}),
}


def make(name: str, root: Path) -> Case:
    maker, options, unit = {**CASES, **DEEP}[name]
    space = {**SPACE, **unit}
    if unit["attention_unit"] == "query_head":
        space["heads"] = [0.5, 1.0]
    theirs = maker(**options)
    info = hf_toy.checkpoint(hf_toy.save(theirs, root / "hf"), root / "run", space)
    write(info, root / "out")
    return Case(theirs, info, hf_toy.megatron(info), root / "out", hf_toy.load(root / "out"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("elastic"))
        made[name].model.set_budget(None)
        return made[name]

    return get


def close(found: torch.Tensor, expected: torch.Tensor, message: str = "") -> None:
    torch.testing.assert_close(found, expected, atol=hf_toy.ATOL, rtol=0, msg=lambda text: f"{message}: {text}")


@torch.no_grad()
def greedy(model, prompt: torch.Tensor, count: int = 12, **options) -> torch.Tensor:
    given = dict(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return model.generate(prompt, **{"attention_mask": torch.ones_like(prompt), **given, **options})


@pytest.mark.parametrize("name", CASES)
def test_every_sub_network_is_the_checkpoints(cases, name):
    case = cases(name)
    model, info = case.model, case.info
    assert torch.equal(hf_toy.logits(model), hf_toy.logits(case.theirs))
    expected = hf_toy.logits(case.theirs)
    for seed in range(10):
        net = toy.random_network(info.model, info.space, seed)
        model.set_subnetwork(net.to_dict())
        found = hf_toy.logits(model)
        close(found, hf_toy.logits(case.megatron, net), f"seed {seed}")
        assert net == SubNetwork.full(info.model) or not torch.allclose(found, expected, atol=1e-2)
        assert model.subnetwork == net.to_dict() and model.costs()["parameters"] == count_parameters(info.model, net)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(info.model)
    prompt = hf_toy.tokens(2, 5)
    assert torch.equal(greedy(model, prompt), greedy(model, prompt, use_cache=False))


@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_any_shape(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("any")
    theirs, space = hf_toy.any_model(data.draw)
    info = hf_toy.checkpoint(hf_toy.save(theirs, root / "hf"), root / "run", space)
    write(info, root / "out")
    model = hf_toy.load(root / "out")
    net = toy.random_network(info.model, info.space, data.draw(st.integers(0, 99), "seed"))
    for policy in KV_POLICIES:
        model.set_subnetwork(net.to_dict(), kv_policy=policy)
        close(hf_toy.logits(model), hf_toy.logits(hf_toy.masked(theirs, info.model, net)))
        prompt = hf_toy.tokens(2, 3)
        assert torch.equal(greedy(model, prompt, 4), greedy(model, prompt, 4, use_cache=False))


class Operands(TorchFunctionMode):
    """Records the weight operand of every product inside the context."""

    def __init__(self):
        super().__init__()
        self.weights: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        place = {"linear": 1, "addmm": 2, "bmm": 1, "embedding": 1}.get(getattr(func, "__name__", ""))
        if place is not None:
            self.weights.append(args[place])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["llama, groups", "llama, query heads", "gpt2"])
def test_products_are_with_views_of_the_one_copy(cases, name):
    case = cases(name)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in case.model.parameters()}
    full = None
    for seed in (None, 0, 1):
        net = SubNetwork.full(case.info.model) if seed is None else toy.random_network(case.info.model, case.info.space, seed)
        case.model.set_subnetwork(net.to_dict())
        with Operands() as seen, torch.no_grad():
            case.model(hf_toy.tokens(1, 4))
        assert all(weight.untyped_storage().data_ptr() in storages for weight in seen.weights)
        used = sum(weight.numel() for weight in seen.weights)
        full = full or used
        # Weights used are those of the network, and all keys and values, which every network writes by default.
        left_out = count_parameters(case.info.model) - count_parameters(case.info.model, net)
        keys = sum(2 * (case.info.model.num_query_groups - layer.kv_groups) * case.info.model.kv_channels for layer in net.layers)
        weights_only = left_out - keys * case.info.model.hidden_size
        slack = 0 if not case.info.model.bias else 1000
        assert abs(full - used - weights_only) <= slack and (seed is None or used < full)


LEFT = ["llama, groups", "llama, query heads", "llama, biases", "gpt2"]


@pytest.mark.parametrize("name", LEFT)
def test_generate_with_left_padding_and_sampling(cases, name):
    case = cases(name)
    net = toy.random_network(case.info.model, case.info.space, 5)
    for policy in KV_POLICIES:
        case.model.set_subnetwork(net.to_dict(), kv_policy=policy)
        short, long = hf_toy.tokens(1, 3), hf_toy.tokens(1, 7)
        both = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), long])
        mask = torch.ones_like(both)
        mask[0, :4] = 0
        found = greedy(case.model, both, attention_mask=mask)
        assert torch.equal(found[0, 4:], greedy(case.model, short)[0]) and torch.equal(found[1], greedy(case.model, long)[0])
        drawn = []
        for cached in (True, False):
            torch.manual_seed(3)
            drawn.append(greedy(case.model, both, attention_mask=mask, do_sample=True, use_cache=cached))
        assert torch.equal(*drawn) and not torch.equal(drawn[0], found)
        beams = [greedy(case.model, both, 6, attention_mask=mask, num_beams=3, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*beams)


@torch.no_grad()
def in_steps(model, tokens: torch.Tensor, nets, starts, policies) -> torch.Tensor:
    """Logits of tokens in pieces with one cache: piece i, from starts[i] on, goes through nets[i] with policies[i]."""
    cache, found = DynamicCache(), []
    for net, policy, first, last in zip(nets, policies, starts, [*starts[1:], tokens.shape[1]], strict=True):
        model.set_subnetwork(net.to_dict(), kv_policy=policy)
        for start in range(first, last) if first % 2 else [first]:  # odd starts: token by token; even: the whole piece
            end = start + 1 if first % 2 else last
            found.append(model(tokens[:, start:end], past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("name", ["llama, groups", "llama, query heads", "llama, mha", "gpt2"])
def test_a_switch_keeps_the_cache(cases, name, kv_policy, implementation):
    """Switching networks within a text equals Megatron-Core with these networks as fixed levels of the tokens."""
    case = cases(name)
    case.model.set_attn_implementation(implementation)
    info, choices = case.info, Choices(case.info.model, case.info.space)
    tokens, starts = hf_toy.tokens(2, 24), [0, 6, 9, 15, 20]
    for seed in (10, 20):
        nets = [toy.random_network(info.model, info.space, seed + i) for i in range(len(starts))]
        levels_NSB = torch.zeros(choices.count, 24, 2, dtype=torch.long)
        for net, start in zip(nets, starts, strict=True):
            levels_NSB[:, start:] = torch.tensor(choices.indices(net))[:, None, None]
        with use_subnetwork(case.megatron, FixedLevels(levels_NSB, kv_policy)), torch.no_grad():
            expected = case.megatron(tokens, torch.arange(24).expand_as(tokens), None)
        close(in_steps(case.model, tokens, nets, starts, [kv_policy] * 5), expected)
    case.model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("name", ["llama, groups", "gpt2"])
def test_both_policies_may_share_one_cache(cases, name):
    """Networks with KV policies own and full read each other's keys in one cache."""
    case = cases(name)
    full = SubNetwork.full(case.info.model)
    tokens, starts = hf_toy.tokens(1, 16), [0, 5, 10]
    same = in_steps(case.model, tokens, [full] * 3, starts, ["full", "own", "full"])
    close(same, hf_toy.logits(case.model.at(None))[:1, :16])
    half = case.info.space.uniform(case.info.model, case.info.space.heads[0], 40)
    small = in_steps(case.model, tokens, [full, half, full], starts, ["full", "own", "full"])
    other = in_steps(case.model, tokens, [full, half, full], starts, ["full", "full", "full"])
    close(small[:, :10], other[:, :10])
    assert not torch.allclose(small[:, 10:], other[:, 10:], atol=1e-3)  # the half network wrote fewer KV groups


def test_own_keys_make_a_small_cache_and_a_switch_is_seen_by_generate(cases):
    case = cases("llama, mha")
    space, arch = case.info.space, case.info.model
    small, sizes = space.uniform(arch, space.heads[0], 40), {}
    for policy in KV_POLICIES:
        case.model.set_subnetwork(small.to_dict(), kv_policy=policy)
        cache = DynamicCache()
        prompt = hf_toy.tokens(1, 8)
        first = greedy(case.model, prompt, 4, past_key_values=cache)
        sizes[policy] = cache.layers[0].keys.shape[1], cache.layers[0].values.shape[1]
        case.model.set_budget(None)
        again = greedy(case.model, first, 4, past_key_values=cache)
        assert again.shape[1] == 16 and cache.get_seq_length() == 15
    assert sizes == {"full": (8, 8), "own": (3, 2)}  # own: 2 KV groups and, with the keys, a count of groups


def test_handles_share_the_weights(cases):
    case = cases("llama, groups")
    net = toy.random_network(case.info.model, case.info.space, 1)
    view = case.model.at(network=net.to_dict())
    assert case.model.subnetwork == SubNetwork.full(case.info.model).to_dict() and view.subnetwork == net.to_dict()
    assert all(a is b for a, b in zip(case.model.parameters(), view.parameters(), strict=True))
    close(hf_toy.logits(view), hf_toy.logits(case.megatron, net))
    close(hf_toy.logits(case.model), hf_toy.logits(case.theirs))


@pytest.mark.parametrize("name", ["llama, groups", "llama, query heads", "gpt2, untied"])
def test_speculative_decoding_is_greedy_decoding(cases, name):
    case = cases(name)
    space, arch = case.info.space, case.info.model
    full = SubNetwork.full(arch)
    near = SubNetwork(arch.hidden_size, (full.layers[0], space.layer_choice(arch, space.heads[-1], 30)))
    drafts = {"itself": full, "near": near, "far": space.uniform(arch, space.heads[0], 10)}
    rates = {}
    for policy in KV_POLICIES:
        for seed, (draft, net) in enumerate(drafts.items()):
            prompt = hf_toy.tokens(1, 6 + seed)
            case.model.set_budget(None, kv_policy=policy)
            expected = greedy(case.model, prompt, 24)
            options = dict(eos_token_id=None, pad_token_id=0)
            found = case.model.generate_speculative(prompt, net.to_dict(), draft_length=3, max_new_tokens=24, **options)
            assert torch.equal(found.sequences, expected) and found.new_tokens == 24
            assert found.passes + found.accepted == 24 and 0 <= found.accepted <= found.drafted <= 3 * found.passes
            rates[draft] = found.acceptance_rate
    assert rates["itself"] == 1.0 and rates["far"] < 1.0
    with pytest.raises(ValueError, match="decodes one sequence, not 2"):
        case.model.generate_speculative(hf_toy.tokens(2, 4))


def test_saved_and_loaded_again(cases, tmp_path):
    for name in ("llama, biases", "gpt2"):
        case = cases(name)
        case.model.save_pretrained(tmp_path / name)
        again = hf_toy.load(tmp_path / name)
        for budget in (0.5, 0.8, None):
            again.set_budget(budget)
            case.model.set_budget(budget)
            assert again.subnetwork == case.model.subnetwork and again.budget == budget
            assert torch.equal(hf_toy.logits(again), hf_toy.logits(case.model))


def test_written_files_and_figures(cases):
    case = cases("llama, groups")
    config = json.loads((case.folder / "config.json").read_text())
    assert config["architectures"] == ["FlextronElasticLlamaForCausalLM"] and config["num_attention_heads"] == 8
    job = Job(case.info, SubNetwork.full(case.info.model), case.folder)
    nets = FORMAT.networks(job)
    assert len(nets) >= 4 and nets[0] == job.net and any(not net.is_uniform for net in nets)
    for net in nets:
        close(FORMAT.logits(job, net, hf_toy.tokens()), hf_toy.logits(case.megatron, net))
    deep = cases("deep gpt2").info
    checked = FORMAT.networks(Job(deep, SubNetwork.full(deep.model), cases("deep gpt2").folder))
    assert {net.hidden_size for net in checked} == set(deep.space.hidden_size)
    assert {sum(layer.executed for layer in net.layers) for net in checked} == set(deep.space.depth)
    files = {file.stem for file in case.folder.glob("*.py")}
    modeling = (case.folder / "modeling_flextron_elastic_llama.py").read_text()
    # transformers 4.57 fetches the files that this file imports, and none that those import.
    assert set(re.findall(r"^from \.(\w+)", modeling, re.M)) == files - {"modeling_flextron_elastic_llama"}
    for file in case.folder.glob("*.py"):
        imports = re.findall(r"^ *(?:from|import) ([\w.]+)", file.read_text(), re.M)
        standard = {
            "contextlib",
            "contextvars",
            "copy",
            "functools",
            "inspect",
            "json",
            "math",
            "pathlib",
            "re",
            "shutil",
            "time",
        }
        assert {name.split(".")[0] for name in imports if not name.startswith(".")} <= {"torch", "transformers"} | standard
    assert "\n| selector of the networks | `uniform` |\n" in (case.folder / "README.md").read_text()


def test_bad_networks_and_budgets_are_refused(cases, tmp_path):
    case = cases("llama, groups")
    info, model = case.info, case.model
    smaller = info.space.uniform(info.model, 4, 40)
    (tmp_path / "out").mkdir()
    with pytest.raises(FlextronError, match="format=hf_elastic: holds every sub-network"):
        FORMAT.write(Job(info, smaller, tmp_path / "out"))
    other = HfElasticSettings(selector="sensitivity", latency=None)
    with pytest.raises(FlextronError, match="selector=sensitivity: format=hf_elastic needs the networks of all budgets"):
        FORMAT.write(Job(info, SubNetwork.full(info.model), tmp_path / "out", settings=other))
    assert not list((tmp_path / "out").iterdir())
    full = model.subnetwork
    for budget, words in {
        "x": "is not a number with a unit", "3 parsecs": "the unit 'parsecs' is not known", "25ms": "is of latency, which this",
        0.01: "is not within", 1.2: "is not within", "0.6,0.7 memory": "several budgets at once", "2kB": "is not within",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=words) as caught:
            model.set_budget(budget)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no adaptive routers"):
        model.set_budget(0.6, adaptive=True)
    with pytest.raises(ValueError, match="kv_policy='some' is not known"):
        model.set_budget(0.6, kv_policy="some")
    for change, words in (
        ({"hidden_size": 40}, "hidden_size 40 is not a candidate"),
        ({"layers": full["layers"][:1]}, "has 1 layers, the model has 2"),
        ({"layers": [{**full["layers"][0], "ffn_hidden_size": 11}] * 2}, r"layers\[0\].ffn_hidden_size 11 is not"),
        ({"layers": [{**full["layers"][0], "kv_groups": 9}] * 2}, "9 KV groups x 2 query heads, not a candidate"),
        ({"layers": [{**full["layers"][0], "executed": False}] * 2}, "0 executed layers are not a candidate"),
        ({"layers": [{"heads": 4}] * 2}, "expected {'hidden_size', 'layers'"),
    ):
        with pytest.raises(ValueError, match=words):
            model.set_subnetwork({**full, **change})
    assert model.subnetwork == full  # the refusals left the choice as it was
    with pytest.raises(ValueError, match="was not loaded from an exported directory"):
        type(model)(model.config).set_budget(0.5)
    with pytest.raises(ValueError, match='kv_policy="own" works with a DynamicCache'):
        model.set_subnetwork(smaller.to_dict(), kv_policy="own")
        greedy(model, hf_toy.tokens(1, 4), cache_implementation="static")
