"""Scores of continuations are those of the logits of each sequence alone."""

from __future__ import annotations

import pytest
import torch

from flextron_mcore.pipeline.logits import forward_logits
from flextron_mcore.pipeline.scores import Continuation, score
from flextron_mcore.space import ElasticSpace
from tests import toy

LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.2], "long_factor": [1.5, 9.0], "original_max_position_embeddings": 10}


@pytest.mark.parametrize("seed, scaling", [(None, None), (3, None), (3, LONGROPE)])
def test_scores_are_those_of_the_logits(monkeypatch, seed, scaling):
    monkeypatch.setattr("flextron_mcore.config.LOGITS_AT_ONCE", 3 * toy.VOCAB)  # logits of three tokens at a time
    arch = toy.config(share_embeddings_and_output_weights=seed is None, num_attention_heads=8, rope_scaling=scaling)
    space = ElasticSpace.build(arch, heads=[0.5, 1.0], hidden_size=[0.5, 1.0])
    model, network = toy.model(arch, space), None if seed is None else toy.random_network(arch, space, seed)
    asked, expected = [], []
    for i, length in enumerate((9, 24, 1, 9, 17, 9)):
        tokens = tuple(toy.inputs(1, seed=i % 3, length=length)[0][0].tolist())
        logits_SV = forward_logits([model], network, torch.tensor([tokens]))[0]
        likeliest = logits_SV.argmax(-1).tolist()
        for count in {1, min(5, length), length}:
            for targets in (likeliest[-count:], [*likeliest[-count:-1], (likeliest[-1] + 1) % toy.VOCAB]):
                asked.append(Continuation(tokens, tuple(targets)))
                log_SV = logits_SV.log_softmax(-1)[-count:]
                found = log_SV.gather(-1, torch.tensor(targets)[:, None]).sum().item()
                expected.append((found, targets == likeliest[-count:], likeliest[-1]))
    done = []
    for size in (1, 4, 50):
        found = score([model], network, asked, size, done.append)
        assert [(each.greedy, each.likeliest) for each in found] == [(greedy, last) for _, greedy, last in expected]
        assert [each.log_probability for each in found] == pytest.approx([value for value, *_ in expected], rel=1e-5, abs=1e-5)
    assert sum(done) == 3 * len(asked)
