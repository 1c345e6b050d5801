"""format=hf_elastic over all axes: smaller hidden sizes and skipped layers, with one KV cache."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from flextron_mcore.exports import hf
from flextron_mcore.exports.cut import placed_tensors
from flextron_mcore.exports.formats import Job
from flextron_mcore.settings.sections import KV_POLICIES
from flextron_mcore.space import SubNetwork, count_parameters
from tests import hf_toy, toy
from tests.exports.test_hf_elastic import DEEP, Case, Operands, close, greedy, in_steps, make, write


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in made:
            made[name] = make(name, tmp_path_factory.mktemp("axes"))
        return made[name]

    return get


@pytest.mark.parametrize("maker", [hf_toy.llama, hf_toy.gpt2])
def test_hidden_size_and_depth(maker, tmp_path):
    """Each network has the logits of the dense model of its size that format=hf writes."""
    theirs = maker()
    hidden = theirs.config.hidden_size
    space = {"hidden_size": [hidden // 2, hidden], "depth": [1, 2]}
    info = hf_toy.checkpoint(hf_toy.save(theirs, tmp_path / "hf"), tmp_path / "run", space)
    write(info, tmp_path / "out")
    model = hf_toy.load(tmp_path / "out")
    full = SubNetwork.full(info.model)
    small = info.space.layer_choice(info.model, info.space.heads[0], info.space.ffn_hidden_size[0])
    skipped = replace(full.layers[0], executed=False)
    sizes = [(hidden // 2, (small, full.layers[1])), (hidden, (skipped, small)), (hidden // 2, (small, skipped))]
    for number, net in enumerate(SubNetwork(*size) for size in sizes):
        dense = tmp_path / f"dense{number}"
        dense.mkdir()
        hf.write(Job(info, net, dense))
        expected = hf_toy.load(dense)
        for policy in KV_POLICIES:
            model.set_subnetwork(net.to_dict(), kv_policy=policy)
            close(hf_toy.logits(model), hf_toy.logits(expected), f"{number}")
            prompt = hf_toy.tokens(2, 4)
            for cached in (True, False):
                assert torch.equal(greedy(model, prompt, use_cache=cached), greedy(expected, prompt))
            assert model.costs()["parameters"] == count_parameters(info.model, net)
        assert "latency" not in model.costs() and model.subnetwork == net.to_dict()


@pytest.mark.parametrize("name", DEEP)
def test_all_axes_are_the_checkpoints(cases, name):
    """Logits equal the checkpoint's. Only the network's weights are used, as views of the one copy."""
    case = cases(name)
    info, storages = case.info, {p.untyped_storage().data_ptr() for p in case.model.parameters()}
    tied = info.model.share_embeddings_and_output_weights
    nets = [toy.random_network(info.model, info.space, seed) for seed in range(12)]
    assert len({net.hidden_size for net in nets}) == 3 and len({sum(row.executed for row in net.layers) for net in nets}) == 3
    for net in nets:
        expected = hf_toy.logits(case.megatron, net)
        for policy in KV_POLICIES:
            case.model.set_subnetwork(net.to_dict(), kv_policy=policy)
            close(hf_toy.logits(case.model), expected, f"{net}, {policy}")
        assert case.model.subnetwork == net.to_dict()
        assert case.model.costs()["parameters"] == count_parameters(info.model, net)
        with Operands() as seen, torch.no_grad():
            case.model(hf_toy.tokens(1, 4), use_cache=False)
        assert all(weight.untyped_storage().data_ptr() in storages for weight in seen.weights)
        owned = sum(math.prod(placed.shape) for placed in placed_tensors(info.model, net) if len(placed.shape) == 2)
        assert sum(weight.numel() for weight in seen.weights) == owned + tied * info.model.vocab_size * net.hidden_size
    case.model.set_budget(None)
    assert torch.equal(hf_toy.logits(case.model), hf_toy.logits(case.theirs))


def layers_of(model: PreTrainedModel) -> list[torch.nn.Module]:
    return list(model.model.layers if hasattr(model, "model") else model.transformer.h)


@pytest.mark.parametrize("name", ["deep llama", "deep llama, query heads", "deep gpt2"])
def test_a_skipped_layer_is_not_executed(cases, name):
    case = cases(name)
    called: list[tuple[int, str]] = []
    handles = [
        part.register_forward_hook(lambda *_, index=index, part_name=part_name: called.append((index, part_name)))
        for index, layer in enumerate(layers_of(case.model))
        for part_name, part in layer.named_children()
    ]
    net = case.info.space.uniform(case.info.model, case.info.space.heads[0], 10, case.info.space.hidden_size[0], 1)
    assert [layer.executed for layer in net.layers] == [False, True, False]
    for policy, cached, wanted in (("own", True, {1}), ("full", False, {1}), ("full", True, {0, 1, 2})):
        called.clear()
        case.model.set_subnetwork(net.to_dict(), kv_policy=policy)
        cache = DynamicCache() if cached else None
        with torch.no_grad():
            case.model(hf_toy.tokens(1, 4), past_key_values=cache, use_cache=cached)
        if (policy, cached) == ("own", True):
            held = [layer.values.numel() if layer.is_initialized else None for layer in cache.layers]
            assert held[0] == 0 and held[1] > 0 and held[2:] in ([], [None])  # the first layer holds no keys but counts positions
            assert cache.get_seq_length() == 4
            called = [pair for pair in called if pair[0] != 0]
        assert {index for index, _ in called} == wanted
        assert not any("mlp" in part for index, part in called if index != 1)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def by_stock_models(models: dict[int, PreTrainedModel], tokens, plan, kv_policy: str) -> torch.Tensor:
    """Logits of dense models of several hidden sizes that share a cache, one after another.

    Args:
        models: {hidden size: dense model}.
        tokens: [batch, sequence].
        plan: a row for each piece of the text: (hidden size, executed layers, first position).
        kv_policy: with `own`, a layer does not see positions at which it was skipped.
    """
    cache, found, skipped = DynamicCache(), [], [[] for _ in layers_of(next(iter(models.values())))]
    for (hidden, executed, first), last in zip(plan, [*(start for *_, start in plan[1:]), tokens.shape[1]], strict=True):
        model = copy.deepcopy(models[hidden])
        for index, layer in enumerate(layers_of(model)):
            attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attn
            if index not in executed:
                skipped[index] += range(first, last)
                for key, parameter in layer.named_parameters():
                    if any(part in key for part in ("o_proj", "down_proj", "c_proj")):
                        parameter.zero_()
            elif kv_policy == "own":
                seen = torch.ones(last - first, last, dtype=torch.bool).tril(first)
                seen[:, skipped[index]] = False
                change = {"attention_mask": seen[None, None]}
                attention.register_forward_pre_hook(lambda _, args, given, c=change: (args, {**given, **c}), with_kwargs=True)
        found.append(model(tokens[:, first:last], past_key_values=cache, use_cache=True).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("kv_policy", KV_POLICIES)
@pytest.mark.parametrize("name", DEEP)
def test_a_switch_of_hidden_size_and_depth(cases, name, kv_policy, tmp_path):
    """Switching equals dense models of each hidden size that share a cache, with zeros in the projections of skipped layers."""
    case = cases(name)
    arch, space = case.info.model, case.info.space
    models = {}
    for hidden in space.hidden_size:
        (tmp_path / f"{hidden}").mkdir()
        whole = space.network(arch, SubNetwork.full(arch).layers, hidden)
        hf.write(Job(case.info, whole, tmp_path / f"{hidden}"))
        models[hidden] = hf_toy.load(tmp_path / f"{hidden}")
    tokens, (small, middle, full) = hf_toy.tokens(2, 24), space.hidden_size
    for plan in (
        [(small, {1}, 0), (full, {0, 1, 2}, 6), (middle, {1, 2}, 9), (full, {0, 1, 2}, 15), (small, {1}, 20)],
        [(full, {0, 1, 2}, 0), (small, {1}, 4), (middle, {1, 2}, 9), (full, {0, 1, 2}, 13)],
        [(full, {1, 2}, 0), (small, {1, 2}, 8), (full, {1}, 10), (middle, {0, 1, 2}, 14)],
    ):
        nets = [space.network(arch, SubNetwork.full(arch).layers, hidden, len(layers)) for hidden, layers, _ in plan]
        starts = [start for *_, start in plan]
        found = in_steps(case.model, tokens, nets, starts, [kv_policy] * len(plan))
        close(found, by_stock_models(models, tokens, plan, kv_policy), f"{plan}")
    # Both policies in one cache: after `own`, a `full` network misses the keys that were not written.
    plan = [(full, {1}, 0), (full, {0, 1, 2}, 6)]
    nets = [space.network(arch, SubNetwork.full(arch).layers, hidden, len(layers)) for hidden, layers, _ in plan]
    stepped = in_steps(case.model, tokens, nets, [0, 6], ["own", "full"])
    close(stepped, by_stock_models(models, tokens, plan, "own"))


@pytest.mark.parametrize("name", DEEP)
def test_generate_with_a_narrow_and_shallow_network(cases, name):
    case = cases(name)
    arch, space = case.info.model, case.info.space
    net = space.uniform(arch, space.heads[-2], 20, space.hidden_size[0], 1)
    short, long = hf_toy.tokens(1, 3), hf_toy.tokens(1, 7)
    both = torch.cat([torch.cat([torch.zeros(1, 4, dtype=torch.long), short], 1), long])
    mask = torch.ones_like(both)
    mask[0, :4] = 0
    for policy in KV_POLICIES:
        case.model.set_subnetwork(net.to_dict(), kv_policy=policy)
        found = greedy(case.model, both, attention_mask=mask)
        assert torch.equal(found[0, 4:], greedy(case.model, short)[0]) and torch.equal(found[1], greedy(case.model, long)[0])
        beams = [greedy(case.model, both, 6, attention_mask=mask, num_beams=3, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*beams)
        cache = DynamicCache()
        first = greedy(case.model, long, 4, past_key_values=cache)
        case.model.set_budget(None, kv_policy=policy)
        assert greedy(case.model, first, 4, past_key_values=cache).shape[1] == 15 and cache.get_seq_length() == 14
        expected = greedy(case.model, long)
        drafted = case.model.generate_speculative(long, net.to_dict(), max_new_tokens=12, eos_token_id=None, pad_token_id=0)
        assert torch.equal(drafted.sequences, expected)
        verified = case.model.at(network=net.to_dict(), kv_policy=policy)
        drafted = verified.generate_speculative(long, net.to_dict(), max_new_tokens=12, eos_token_id=None, pad_token_id=0)
        assert drafted.acceptance_rate == 1 and torch.equal(drafted.sequences, greedy(verified, long))
