"""Interface to lm_eval: texts are continued, with a KV cache and without, and long contexts are cut."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from flextron_mcore.data.tokenizer import train_tokenizer
from flextron_mcore.evaluation.harness import ElasticLM, Harness, Prompts
from flextron_mcore.pipeline.scores import Score
from flextron_mcore.space import ElasticSpace
from tests import toy


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the loss of the network, and the network of the loss"] * 3, 270)


def test_whole_passes_write_what_decoding_with_a_cache_writes(tokenizer):
    arch = toy.config(vocab_size=tokenizer.vocab_size, max_position_embeddings=64)
    space = ElasticSpace.build(arch, heads=[0.5, 1.0])
    network = toy.random_network(arch, space, 1)
    harness = Harness([toy.model(arch, space)], tokenizer, 64, {5}, None, 3)
    prompts = [toy.inputs(1, seed, arch.vocab_size, length)[0][0].tolist() for seed, length in enumerate((7, 3, 9, 1, 7))]
    free = harness._continued(Prompts(prompts, 20, []), network)
    letters = {letter for ids in free for letter in tokenizer.hf.decode(ids[5:12])}
    question = Prompts(prompts, 20, [min(letters)])

    def finished(ids):
        return min(letters) in tokenizer.hf.decode(ids, skip_special_tokens=True)

    written = harness._continued(question, network)
    assert written == harness._continued_without_cache(question, network, finished)
    assert written != free and all(whole[: len(ids)] == ids for whole, ids in zip(free, written, strict=True))
    assert any(finished(ids) for ids in written) and not any(finished(ids[:-1]) for ids in written)


def test_long_contexts_are_cut_on_the_left(tokenizer):
    asked = []

    def ask(question):
        asked.extend(question)
        return [Score(-1.0, False, 0)] * len(question)

    lm = ElasticLM(ask, tokenizer, 8)
    ids = tokenizer.hf.encode("the loss of the network, and the network of the loss")
    lm._loglikelihood_tokens([(None, ids[:-3], ids[-3:])])
    assert len(ids) > 12 and asked[0].tokens == tuple(ids[-9:-1]) and asked[0].targets == tuple(ids[-3:])
    (total,) = lm.loglikelihood_rolling([SimpleNamespace(args=("the loss of the network, and the network of the loss",))])
    windows = asked[1:]
    assert total == -len(windows) and [i for each in windows for i in each.targets] == ids
    assert windows[0].tokens[0] == tokenizer.eod and max(len(each.tokens) for each in windows) == 8
