"""Decoding of several prompts with a KV cache chooses the tokens that passes over each text alone, without a cache, choose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flextron_mcore.adaptive.routers import AdaptiveRouters
from flextron_mcore.adaptive.routing import AdaptiveRouting
from flextron_mcore.choices import Choices
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.evaluation.generation import Sampling, generate
from flextron_mcore.routers.static import StaticRouters
from flextron_mcore.settings.sections import KV_POLICIES
from flextron_mcore.space import ElasticSpace
from tests import toy

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5], [3]]
NEW = 6


@pytest.fixture(scope="module")
def case():
    arch = toy.config(num_query_groups=2)
    space = ElasticSpace.build(arch, granularity=1, heads=[2, 4], ffn_hidden_size=[12, 48])
    return arch, space, toy.model(arch, space)


def networks(case, kind: str):
    """Function that makes the network anew for each use, because a routing counts its tokens."""
    arch, space, _ = case
    if kind == "whole model":
        return lambda: None
    if kind == "sub-network":
        net = toy.random_network(arch, space, 2)
        return lambda: net
    choices = Choices(arch, space)
    torch.manual_seed(3)
    routers = AdaptiveRouters(choices, 1, 16, StaticRouters(choices, 1, 16))
    with torch.no_grad():
        routers.out_NKU.normal_(std=2)
    return lambda: AdaptiveRouting(routers, torch.tensor([0.5]), kind)


@torch.no_grad()
def by_whole_passes(model, make, prompt: list[int], count: int) -> tuple[list[int], torch.Tensor | None]:
    """Greedy decoding without a cache: the new ids, and the token counts [blocks, candidates] of the last pass."""
    ids, network = list(prompt), None
    for _ in range(count):
        network = make()
        if hasattr(network, "begin"):
            network.begin()
        with use_subnetwork(model, network):
            logits = model(torch.tensor([ids]), torch.arange(len(ids))[None], None)
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :], getattr(network, "counts_NK", None)


@pytest.mark.parametrize("kind", ["whole model", "sub-network", *KV_POLICIES])
def test_prompts_decoded_together_are_those_decoded_alone(case, kind):
    make = networks(case, kind)
    *_, model = case
    network = make()
    found = generate(model, PROMPTS, network, NEW)
    alone = [by_whole_passes(model, make, prompt, NEW) for prompt in PROMPTS]
    assert found.ids == [ids for ids, _ in alone]
    assert len({tuple(ids) for ids in found.ids}) == len(PROMPTS)
    if alone[0][1] is not None:  # every computed token is counted once; padding and ended texts are not
        assert torch.equal(network.counts_NK, sum(counts for _, counts in alone))
        assert (network.counts_NK.sum(0)[:2] > 0).all()


@pytest.mark.parametrize("kind", ["whole model", "sub-network", *KV_POLICIES])
def test_texts_that_outgrow_the_original_context_of_longrope(case, kind):
    """Each text switches to the long factors when it has more than 5 tokens: one prompt at once, the others while they grow."""
    arch, space, _ = case
    factors = {"short_factor": [1.0, 1.2, 1.4, 1.6], "long_factor": [1.0, 4.0, 9.0, 16.0]}
    arch = replace(arch, rope_scaling={"type": "longrope", "original_max_position_embeddings": 5, **factors}, rotary_base=50.0)
    case = arch, space, toy.model(arch, space)
    make = networks(case, kind)
    alone = [by_whole_passes(case[-1], make, prompt, NEW)[0] for prompt in PROMPTS]
    assert generate(case[-1], PROMPTS, make(), NEW).ids == alone
    assert generate(case[-1], PROMPTS[::2], make(), NEW).ids == alone[::2]
    stopped = generate(case[-1], PROMPTS, make(), NEW, finished=lambda ids: len(ids) == 2).ids
    assert stopped == [ids[:2] for ids in alone]


def test_a_text_ends_at_its_end_token(case):
    *_, model = case
    whole = generate(model, PROMPTS, None, NEW).ids
    end = whole[0][2]
    found = generate(model, PROMPTS, None, NEW, {end}).ids
    for ids, other in zip(found, whole, strict=True):
        assert ids == (other[: other.index(end) + 1] if end in other else other)
    assert len(found[0]) <= 3


def test_sampling_by_temperature_top_k_and_seed(case):
    *_, model = case
    draw = lambda **options: generate(model, PROMPTS, None, NEW, sampling=Sampling(**options)).ids  # noqa: E731
    greedy = draw()
    assert draw(temperature=2.0) == draw(temperature=2.0) != draw(temperature=2.0, seed=5)
    assert draw(temperature=2.0) != greedy
    assert draw(temperature=2.0, top_k=1) == greedy == draw(temperature=1e-4)
    with torch.no_grad():
        logits_V = model(torch.tensor([[3]]), torch.tensor([[0]]), None)[0, -1]
    two = set(logits_V.topk(2).indices.tolist())
    firsts = {generate(model, [[3]], None, 1, sampling=Sampling(5.0, 2, seed)).ids[0][0] for seed in range(30)}
    assert firsts == two


def test_progress_is_reported(case):
    *_, model = case
    seen: list[int] = []
    generate(model, PROMPTS, None, NEW, progress=lambda: seen.append(1))
    assert len(seen) == max(map(len, PROMPTS)) + NEW - min(map(len, PROMPTS))
