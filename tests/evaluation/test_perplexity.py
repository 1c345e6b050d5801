"""Evaluation: exact means over tokens, the same in every run, and the model is left as it was."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.evaluation.family import uniform_family
from flextron_mcore.evaluation.perplexity import evaluate, mean, perplexity
from flextron_mcore.layers.state import FULL
from flextron_mcore.space import ElasticSpace, SubNetwork
from flextron_mcore.training.sampler import random_family
from tests import toy

ARCH = toy.config()
SPACE = ElasticSpace.build(ARCH)


class Samples(torch.utils.data.Dataset):
    """`count` random sequences, of which the last is half padding."""

    def __init__(self, count: int, seed: int) -> None:
        self.tokens, self.positions = toy.inputs(count, seed, length=toy.LENGTH + 1)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(toy.LENGTH)
        if i == len(self) - 1:
            mask[toy.LENGTH // 2 :] = 0
        tokens = self.tokens[i]
        return {"tokens": tokens[:-1], "labels": tokens[1:], "loss_mask": mask, "position_ids": self.positions[i][:-1]}


def by_hand(model, dataset, net, count):
    total, tokens = 0.0, 0.0
    with torch.no_grad(), use_subnetwork(model, net):
        for i in range(count):
            item = dataset[i]
            logits = model(item["tokens"][None], item["position_ids"][None], None)[0]
            loss = F.cross_entropy(logits, item["labels"], reduction="none")
            total += float((loss.double() * item["loss_mask"]).sum())
            tokens += float(item["loss_mask"].sum())
    return total / tokens


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_losses_are_means_over_tokens_whatever_the_micro_batch(size):
    model = toy.model(ARCH, SPACE).train()
    datasets = {"a": Samples(5, 1), "b": Samples(4, 2)}
    nets = {"full": None, "small": SPACE.uniform(ARCH, 1, 12)}
    found = evaluate([model], datasets, nets, toy.LENGTH, size)
    for name, net in nets.items():
        for domain, dataset in datasets.items():
            assert found[name][domain] == pytest.approx(by_hand(model, dataset, net, len(dataset)), rel=1e-6)
    assert found == evaluate([model], datasets, nets, toy.LENGTH, size)  # deterministic
    assert model.training and model.decoder.layers[0].state is FULL


def test_a_limit_takes_the_first_micro_batches():
    model = toy.model(ARCH, SPACE)
    dataset = Samples(7, 3)
    found = evaluate([model], {"a": dataset}, {"full": None}, toy.LENGTH, 2, max_samples=4)
    assert found["full"]["a"] == pytest.approx(by_hand(model, dataset, None, 4), rel=1e-6)


def test_names_and_networks_of_the_uniform_family():
    family = uniform_family(ARCH, SPACE)
    names = ["uniform 25% heads 25% ffn", "uniform 50% heads 50% ffn", "uniform 75% heads 75% ffn", "full"]
    assert list(family) == names and family["full"] == SubNetwork.full(ARCH)
    uneven = ElasticSpace.build(ARCH, heads=[0.5, 1.0], ffn_hidden_size=[0.25, 0.5, 0.75, 1.0])
    for net in uniform_family(ARCH, uneven).values():
        uneven.check(ARCH, net)
    assert list(uniform_family(ARCH, uneven)) == [
        "uniform 50% heads 25% ffn", "uniform 50% heads 50% ffn", "uniform 100% heads 75% ffn", "full",
    ]  # fmt: skip
    single = ElasticSpace.build(ARCH, heads=[1.0], ffn_hidden_size=[1.0])
    assert list(uniform_family(ARCH, single)) == ["full"]
    every = ElasticSpace.build(
        ARCH, hidden_size=[0.5, 1.0], depth=[1, ARCH.num_layers], heads=[0.5, 1.0], ffn_hidden_size=[0.5, 1.0]
    )
    small, full = uniform_family(ARCH, every).items()
    assert small[0] == f"uniform 50% heads 50% ffn 50% hidden {100 / ARCH.num_layers:.3g}% layers" and full[0] == "full"
    assert (small[1].hidden_size, sum(layer.executed for layer in small[1].layers)) == (ARCH.hidden_size // 2, 1)
    assert random_family(ARCH, SPACE, 1, 2, 3) == random_family(ARCH, SPACE, 1, 2, 3) != random_family(ARCH, SPACE, 1, 3, 3)


def test_perplexity_and_mean():
    assert perplexity(math.log(10)) == pytest.approx(10) and perplexity(1e6) == math.inf
    assert mean({"a": 1.0, "b": 2.0}) == 1.5
