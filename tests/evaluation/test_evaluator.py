"""Evaluator: losses of networks, each of them evaluated once."""

from __future__ import annotations

from flextron_mcore.evaluation.evaluator import Evaluator
from flextron_mcore.evaluation.perplexity import evaluate, mean
from flextron_mcore.space import ElasticSpace, SubNetwork
from tests import toy
from tests.evaluation.test_perplexity import Samples

ARCH = toy.config()
SPACE = ElasticSpace.build(ARCH)


def test_each_network_is_evaluated_once():
    model, datasets = toy.model(ARCH, SPACE), {"a": Samples(5, 1), "b": Samples(3, 2)}
    full, small = SubNetwork.full(ARCH), SPACE.uniform(ARCH, 1, 12)
    done: list[str] = []
    evaluator = Evaluator([model], datasets, toy.LENGTH, 2, batches=2, progress=done.append)
    found = evaluator.losses([small, full, small])
    assert len(done) == 4 and evaluator.samples == 7
    expected = evaluate([model], datasets, {"full": full, "small": small}, toy.LENGTH, 2, 4)
    assert found == [expected["small"], expected["full"], expected["small"]]
    assert evaluator.means([full, small]) == [mean(expected["full"]), mean(expected["small"])]
    assert evaluator.mean(small) == mean(expected["small"]) and len(done) == 4
