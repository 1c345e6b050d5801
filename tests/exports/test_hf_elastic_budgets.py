"""Budgets of an elastic directory: static answers are those of `flextron select`; token routing; examples/chat.py."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from flextron_mcore.adaptive.calibration import target_for
from flextron_mcore.adaptive.export import exported_routers
from flextron_mcore.adaptive.routers import AdaptiveRouters
from flextron_mcore.adaptive.routing import AdaptiveRouting
from flextron_mcore.adaptive.store import AdaptiveInfo, read_adaptive_routers
from flextron_mcore.adaptive.table import token_cost
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choices import Choices
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.config import FlextronError
from flextron_mcore.data.tokenizer import train_tokenizer
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.exports.hf_elastic import family
from flextron_mcore.latency.table import LatencyTable
from flextron_mcore.routers.static import StaticRouters
from flextron_mcore.routers.store import RouterInfo, write_routers
from flextron_mcore.runs import choice
from flextron_mcore.runtime.ranks import place
from flextron_mcore.selection import router
from flextron_mcore.settings.compose import compose
from flextron_mcore.settings.formats import HfElasticSettings
from flextron_mcore.settings.sections import KV_POLICIES, CacheSettings
from flextron_mcore.space import SubNetwork, count_parameters
from tests import hf_toy, toy
from tests.routing_toy import write_table
from tests.stages.conftest import stage

FORMAT = get_format("hf_elastic")
CHAT = Path(__file__).resolve().parents[2] / "examples" / "chat.py"
CALIBRATION = ((0.0, 0.5), (0.4, 0.62), (0.7, 0.6), (0.75, 0.7), (0.75 + 1 / 1024, 0.73), (1.0, 0.93))
LAYERS = 3
SPACE = {"heads": [0.25, 0.5, 0.75, 1.0], "ffn_hidden_size": [10, 20, 30, 40], "granularity": 1}


@pytest.fixture(scope="module", autouse=True)
def wide_bins():
    """Cost bins eight times as wide as the default, for speed: each bin costs a run of the solver."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (router, family):
            patch.setattr(module, "BIN", 0.02)
            patch.setattr(module, "WITHIN", 0.05)
        yield


def routed_checkpoint(
    root: Path,
    costs=("latency",),
    kind="static",
    kv_policy="full",
    maker=hf_toy.llama,
    uniform=False,
    counted=False,
    **space,
) -> CheckpointInfo:
    """Write a checkpoint with random routers, and a latency table if `costs` has latency.

    Args:
        root: directory for the model and its checkpoint.
        costs: costs that the routers were trained for.
        kind: static, gumbel or adaptive.
        kv_policy: KV policy of adaptive routers.
        maker: function that makes the Hugging Face model.
        uniform: one width for all layers.
        counted: the table has costs of token routing, too.
        space: changes of SPACE.
    """
    theirs = maker(**{"num_hidden_layers" if maker is hf_toy.llama else "n_layer": LAYERS})
    info = hf_toy.checkpoint(hf_toy.save(theirs, root / "hf"), root / "run", {**SPACE, **space})
    choices = Choices(info.model, info.space)
    torch.manual_seed(len(costs) + LAYERS)
    memory = {"dtype": "fp32", "batch_size": 1, "length": hf_toy.LENGTH}
    ranges = ((0.3, 1.0),) * len(costs)
    if kind == "adaptive":
        described = AdaptiveInfo(costs, ranges, 8, memory, kv_policy=kv_policy, calibration=CALIBRATION)
    else:
        described = RouterInfo(costs, ranges, 16, memory, kind, uniform=uniform)
    routers = StaticRouters(described.choices(choices), len(costs), 16)
    torch.nn.init.normal_(routers.out_NKU, std=2.0)
    torch.nn.init.normal_(routers.bias_NK)
    if kind == "adaptive":
        routers = AdaptiveRouters(choices, len(costs), 8, routers)
        torch.nn.init.normal_(routers.out_NKU, std=2.0)
        torch.nn.init.normal_(routers.bias_NK, std=0.3)
    file = write_table(info.path, root / "latency.json", counted) if "latency" in costs else None
    table = LatencyTable.from_file(file, info.model, info.space).to_dict() if file else None
    write_routers(info.path, described, routers, table)
    return info


def own(**changes) -> HfElasticSettings:
    """Section `hf_elastic` with `changes`: by default the routers answer budgets, and latency is from the table beside them."""
    return HfElasticSettings(**{"selector": "router", "latency": None, "kv_cache": CacheSettings()} | changes)


def export(info: CheckpointInfo, out: Path, **options):
    out.mkdir()
    token_routers = exported_routers(info, options.get("latency"))
    figures = FORMAT.write(Job(info, SubNetwork.full(info.model), out, settings=own(**options), token_routers=token_routers))
    return figures, hf_toy.load(out)


def selected(info: CheckpointInfo, *keys: str):
    """Function from a budget to the network that `flextron select` takes with these keys."""
    config = compose("select", [f"checkpoint={info.path.parents[1]}", "budget=1.0", *keys])
    table = choice.latency_table(config, info)
    costs = choice.available_costs(config, info, table)
    picks = choice.selector(config, info, config.selector)

    def select(budget) -> SubNetwork:
        return picks.select(choice.budgets(budget, costs))

    return select, costs


def budgets_of(cost, seed: int) -> list[float]:
    """Limits of a cost: both ends, random ones, and those at which the answer changes."""
    drawn = np.random.default_rng(seed).uniform(cost.smallest, cost.full, 60)
    edges = [cost.smallest + i * 0.02 * cost.full for i in range(0, 40, 3)]
    return [v for v in [cost.smallest, cost.full, *drawn.tolist(), *edges] if cost.smallest <= v <= cost.full]


@pytest.mark.parametrize("case", ["latency", "parameters and memory", "query heads", "gpt2"])
def test_answers_are_those_of_select(case, tmp_path):
    costs = ("parameters", "memory") if case == "parameters and memory" else ("latency",)
    space = {"attention_unit": "query_head", "heads": [0.5, 1.0]} if case == "query heads" else {"attention_unit": "kv_group"}
    info = routed_checkpoint(tmp_path, costs, maker=hf_toy.gpt2 if case == "gpt2" else hf_toy.llama, **space)
    figures, model = export(info, tmp_path / "out")
    assert figures["selector"] == "router" and 3 < figures["networks"] < 1200
    select, known = selected(info)
    answers = set()
    for name, cost in known.items():
        for value in budgets_of(cost, 3):
            fraction = f"{value / cost.full!r} {name}"
            model.set_budget(fraction)
            assert SubNetwork.from_dict(model.subnetwork) == (net := select(fraction)), fraction
            answers.add(net)
            found = model.costs()
            for other, theirs in known.items():
                assert found[other] == pytest.approx(theirs.of(net)) and found["share"][other] <= 1
            assert found["bytes"] == 4 * found["parameters"] and found[name] <= value * (1 + 1e-9)
    assert len(answers) > 5
    if "latency" in known:
        full = known["latency"].full
        sizes = [
            f"{0.8e-3 * known['parameters'].full}K",
            f"{0.9 * known['memory'].full / 1024}KiB",
            f"{0.9e-3 * known['memory'].full}kB",
        ]
        for budget in (0.6, "0.75", f"{0.8 * full:.3f}ms", f"{0.8e3 * full:.1f}us", *sizes):
            model.set_budget(budget)
            assert SubNetwork.from_dict(model.subnetwork) == select(budget) and model.budget == budget
    else:
        model.set_budget(0.7)  # a bare fraction is of the routers' first cost
        assert SubNetwork.from_dict(model.subnetwork) == select("0.7 parameters")


ALL_AXES = {
    "hidden_size": [0.5, 1.0],
    "depth": [1, 3],
    "layer_ranking": [1, 2, 0],
    "heads": [0.5, 1.0],
    "ffn_hidden_size": [20, 40],
}


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("maker", [hf_toy.llama, hf_toy.gpt2])
def test_answers_over_all_axes(maker, uniform, tmp_path):
    """Gumbel routers choose hidden size and depth, too: answers are those of `flextron select`."""
    info = routed_checkpoint(tmp_path, kind="gumbel", maker=maker, uniform=uniform, attention_unit="kv_group", **ALL_AXES)
    _, model = export(info, tmp_path / "out")
    select, known = selected(info)
    answers = set()
    for name, cost in known.items():
        for value in budgets_of(cost, 5):
            fraction = f"{value / cost.full!r} {name}"
            model.set_budget(fraction)
            assert SubNetwork.from_dict(model.subnetwork) == (net := select(fraction)), fraction
            answers.add(net)
            for other, theirs in known.items():
                assert model.costs()[other] == pytest.approx(theirs.of(net))
    assert len({net.hidden_size for net in answers}) == 2
    assert {sum(layer.executed for layer in net.layers) for net in answers} == {1, 3}
    smallest = info.space.uniform(info.model, info.space.heads[0], 20, info.space.hidden_size[0], 1)
    assert smallest in answers and SubNetwork.full(info.model) in answers
    megatron = hf_toy.megatron(info)
    assert answers <= set(family.read_networks(info, model.family.values))
    for net in sorted(answers, key=known["parameters"].of)[:3]:
        model.set_budget(f"{known['latency'].of(net)!r}ms")
        chosen = SubNetwork.from_dict(model.subnetwork)
        torch.testing.assert_close(hf_toy.logits(model), hf_toy.logits(megatron, chosen), atol=1e-5, rtol=0)


@pytest.mark.parametrize("axes", ["widths", "all axes"])
@pytest.mark.parametrize("selector", ["uniform", "matformer"])
def test_without_routers_a_family_answers(selector, axes, tmp_path):
    space = {**SPACE, "hidden_size": [24, 48], "depth": [1, 2]} if axes == "all axes" else SPACE
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.llama(), tmp_path / "hf"), tmp_path / "run", space)
    figures, model = export(info, tmp_path / "out", selector="router" if selector == "uniform" else selector)
    assert figures["selector"] == selector == model.family.selector
    assert f"`{selector}`" in (tmp_path / "out" / "README.md").read_text()
    select, known = selected(info, f"selector={selector}")
    assert known.keys() == {"parameters", "memory"} == model.family.costs.keys()
    refused = 0
    for name, cost in known.items():
        for value in budgets_of(cost, 4):
            budget = f"{value / cost.full!r} {name}"
            try:
                expected = select(budget)
            except FlextronError:
                refused += 1
                with pytest.raises(ValueError, match=f"no network of selector {selector} keeps to {name}"):
                    model.set_budget(budget)
                continue
            model.set_budget(budget)
            assert SubNetwork.from_dict(model.subnetwork) == expected, budget
    assert (refused > 0) == (selector == "matformer")


def test_listed_networks_answer_too(tmp_path):
    """A listed network is the answer where it uses more of the budget than the selector's."""
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.llama(), tmp_path / "hf"), tmp_path / "run", SPACE)
    net = toy.random_network(info.model, info.space, 2)
    (tmp_path / "net.json").write_text(net.to_json())
    _, model = export(info, tmp_path / "out", networks=[str(tmp_path / "net.json")])
    _, known = selected(info, "selector=uniform")
    cost = known["parameters"]
    model.set_budget(f"{cost.of(net) / 1e3}K")
    assert model.subnetwork == net.to_dict()
    model.set_budget(f"{(cost.of(net) - 1) / 1e3}K")
    assert model.subnetwork != net.to_dict()
    model.set_budget(1.0)
    assert model.subnetwork == SubNetwork.full(info.model).to_dict()
    (tmp_path / "other.json").write_text(replace(net, hidden_size=40).to_json())
    (tmp_path / "bad").mkdir()
    with pytest.raises(FlextronError, match="other.json: hidden_size 40 is not a candidate"):
        FORMAT.write(
            Job(info, SubNetwork.full(info.model), tmp_path / "bad", settings=own(networks=[str(tmp_path / "other.json")]))
        )


def test_a_listed_network_may_be_narrow_and_shallow(tmp_path):
    """A listed network extends the range of budgets below the selector's smallest network."""
    space = {**SPACE, "hidden_size": [24, 48], "depth": [1, 2]}
    info = hf_toy.checkpoint(hf_toy.save(hf_toy.llama(), tmp_path / "hf"), tmp_path / "run", space)
    net = info.space.uniform(info.model, 2, 40, 24, 1)
    (tmp_path / "net.json").write_text(net.to_json())
    _, model = export(info, tmp_path / "out", selector="matformer", networks=[str(tmp_path / "net.json")])
    size = count_parameters(info.model, net)
    model.set_budget(f"{size / 1e3}K")
    assert SubNetwork.from_dict(model.subnetwork) == net and model.costs()["parameters"] == size
    with pytest.raises(ValueError, match="no network of selector matformer keeps to parameters"):
        model.set_budget(f"{(size - 1) / 1e3}K")


@torch.no_grad()
def steps(model, tokens: torch.Tensor) -> torch.Tensor:
    """Logits after a prompt of 5 tokens and after each further token, decoded one by one."""
    cache = DynamicCache()
    pieces = [tokens[:, :5], *tokens[:, 5:].split(1, 1)]
    return torch.cat([model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces], 1)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("case", ["llama", "query heads", "gpt2"])
def test_tokens_choose_as_in_megatron(case, kv_policy, tmp_path):
    space = {"attention_unit": "query_head", "heads": [0.5, 1.0]} if case == "query heads" else {"attention_unit": "kv_group"}
    maker = hf_toy.gpt2 if case == "gpt2" else hf_toy.llama
    counted = case == "llama"
    info = routed_checkpoint(tmp_path, kind="adaptive", kv_policy=kv_policy, maker=maker, counted=counted, **space)
    _, model = export(info, tmp_path / "out")
    choices = Choices(info.model, info.space)
    described, routers = read_adaptive_routers(info.path, choices)
    megatron, tokens = hf_toy.megatron(info), hf_toy.tokens(2, 20)
    positions = torch.arange(20).expand_as(tokens)
    _, known = selected(info)
    table = LatencyTable.from_file(tmp_path / "latency.json", info.model, info.space)
    known = {name: token_cost(cost, table, kv_policy) for name, cost in known.items()}
    assert bool(known["latency"].overhead) is counted
    for budget in (0.6, 0.75, 0.9):
        model.set_budget(budget, adaptive=True)
        routing = AdaptiveRouting(routers, torch.tensor([target_for(described.calibration, budget)]), kv_policy)
        routing.begin()
        with use_subnetwork(megatron, routing), torch.no_grad():
            expected = megatron(tokens, positions, None)
        assert ((routing.counts_NK > 0).sum(-1) > 1).any()  # tokens have different levels
        with torch.no_grad():
            found = model(tokens).logits
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        share_NK = (routing.counts_NK / routing.counts_NK.sum(-1, keepdim=True)).numpy()
        for name, cost in known.items():
            assert model.costs()[name] == pytest.approx(cost.average(choices, share_NK))
        assert model.adaptive and model.subnetwork is None and model.budget == budget
        torch.testing.assert_close(steps(model, tokens), expected, atol=1e-5, rtol=0)
    shares = np.linspace(0.5, 0.93, 44)
    targets = [target_for(described.calibration, share) for share in shares]
    assert [model.family.target(share) for share in shares] == pytest.approx(targets) and len(set(targets)) > 40
    falls = [(0.0, 0.88), (0.25, 0.8), (0.5, 0.85), (0.5 + 1 / 1024, 0.9), (1.0, 0.95)]
    own, model.family.adaptive["calibration"] = model.family.adaptive["calibration"], falls
    assert [model.family.target(share) for share in shares[31:]] == pytest.approx([target_for(falls, x) for x in shares[31:]])
    model.family.adaptive["calibration"] = [(0.0, 0.6), (1.0, 0.6)]
    assert model.family.target(0.6) == 0.0
    model.family.adaptive["calibration"] = own
    # Padding on the left changes no logits, and is not counted.
    short = tokens[:1, :6]
    model.set_budget(0.75, adaptive=True)
    alone = model.generate(
        short, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(short)
    )
    counted = model._choice.counts_NK.clone()
    padded, mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], 1), torch.tensor([[0] * 3 + [1] * 6])
    model.set_budget(0.75, adaptive=True)
    both = model.generate(padded, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=mask)
    assert torch.equal(both[:, 3:], alone) and torch.equal(model._choice.counts_NK, counted)
    # Back to a static choice, with the same cache and with another.
    with pytest.raises(ValueError, match="the adaptive routers spend 0.500 to 0.930"):
        model.set_budget(0.98, adaptive=True)
    with pytest.raises(ValueError, match="were trained for budgets of latency"):
        model.set_budget("0.8 parameters", adaptive=True)
    net = toy.random_network(info.model, info.space, 1)
    model.set_subnetwork(net.to_dict())
    torch.testing.assert_close(hf_toy.logits(model), hf_toy.logits(megatron, net), atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "again")
    again = hf_toy.load(tmp_path / "again")
    again.set_budget(0.9, adaptive=True)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory) -> Path:
    """Exported elastic directory with a tokenizer and adaptive routers."""
    root = tmp_path_factory.mktemp("chat")
    assert place() == (0, 1)
    info = routed_checkpoint(root, kind="adaptive", attention_unit="kv_group")
    tokenizer = train_tokenizer(["a b c d"], 257)
    theirs = hf_toy.llama(vocab_size=300, num_hidden_layers=LAYERS)
    bigger = hf_toy.checkpoint(hf_toy.save(theirs, root / "hf2"), root / "run2", {**SPACE, "attention_unit": "kv_group"})
    table = json.loads(write_table(bigger.path, root / "bigger.json").read_text())
    described, routers = read_adaptive_routers(info.path, Choices(info.model, info.space))
    write_routers(bigger.path, described, routers, table)
    tokenizer.save(root / "tokenizer")
    (root / "out").mkdir()
    routers = exported_routers(bigger, None)
    FORMAT.write(Job(bigger, SubNetwork.full(bigger.model), root / "out", tokenizer=root / "tokenizer", token_routers=routers))
    return root / "out"


def chat(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(CHAT), str(folder), "--tokens", "6", "--temperature", "0", *options]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=200)


def test_chat_by_a_pipe(chatty):
    result = chat(
        chatty,
        "a b c\n/budget 0.5\nd a\n/adaptive\nb\n/budget nonsense\n/what\n/budget full\na\n/reset\n/quit\nnever\n",
        "--budget",
        "0.8",
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("[")]
    assert "budget 0.8" in lines[0] and "6 tokens" in lines[1] and "tokens/s" in lines[1] and "budget 0.8" in lines[1]
    assert "budget 0.5: " in lines[2] and "6 tokens" in lines[3] and "% of latency" in lines[3]
    assert "token routing" in lines[4] and "token routing" in lines[5]
    assert "is not a number with a unit" in lines[6] and "commands: /budget" in lines[7]
    assert "full model: 100.0% of latency" in lines[8] and len(lines) == 11


def test_chat_says_what_is_wrong(chatty, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("chat", CHAT)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    for folder, budget, words in (
        (chatty, "1.2", "budget=1.2: "),
        (chatty, "x", "not a number"),
        (tmp_path, "1", ""),
    ):
        monkeypatch.setattr(sys, "argv", ["chat.py", str(folder), "--budget", budget])
        assert module.main() == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("chat: ") and words in error


def test_the_command(chatty, tmp_path):
    info = routed_checkpoint(tmp_path / "c", kind="gumbel", attention_unit="kv_group", **ALL_AXES)
    run = info.path.parents[1]
    figures = stage("export", f"checkpoint={run}", "format=hf_elastic", f"out={tmp_path}/out")
    assert figures["max_logit_difference"] < 1e-5 and figures["selector"] == "router"
    assert figures["parameters"] == sum(p.numel() for p in hf_toy.load(tmp_path / "out").parameters())
    for key in ("budget=0.6", f"subnetwork={tmp_path}/x.json"):
        with pytest.raises(FlextronError, match="format=hf_elastic: holds every sub-network, so give no"):
            stage("export", f"checkpoint={run}", "format=hf_elastic", key, f"out={tmp_path}/no")
    (info.path / "latency.json").unlink()
    with pytest.raises(FlextronError, match="its routers were trained for latency: give latency="):
        stage("export", f"checkpoint={run}", "format=hf_elastic", f"out={tmp_path}/no")
    stage(
        "export",
        f"checkpoint={run}",
        "format=hf_elastic",
        f"latency={tmp_path}/c/latency.json",
        "verify=false",
        f"out={tmp_path}/with",
    )
    assert hf_toy.load(tmp_path / "with").family.costs.keys() == {"latency", "parameters", "memory"}
