"""The memory line, and its refusal."""

from __future__ import annotations

import pytest

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.runs import memory
from flextron_mcore.runs.memory import machine_memory, memory_line
from flextron_mcore.settings.compose import compose
from flextron_mcore.space import ElasticSpace
from tests import toy

LLAMA = toy.config(
    num_layers=16,
    hidden_size=2048,
    num_attention_heads=32,
    num_query_groups=8,
    ffn_hidden_size=8192,
    vocab_size=128_256,
    max_position_embeddings=131_072,
)
SPACE = ElasticSpace.build(LLAMA)


def line(stage: str, *keys: str, arch=LLAMA, space=SPACE) -> str:
    given = ["checkpoint=c", "out=o", *([] if stage == "latency" else ["data=d"])]
    return memory_line(compose(stage, [*given, *keys]), CheckpointInfo(arch, space, dtype="bf16"))


def test_the_line_names_length_and_memory(monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 2**40)
    assert line("elastic").startswith("elastic: 8 x 4096 tokens a forward pass (the model has 131072 positions); about ")
    assert line("elastic").endswith(" of memory on a rank, of 1024 GiB")
    assert line("latency").startswith("latency: 2 x 4096 tokens")
    assert line("evaluate", "model.seq_length=512").startswith("evaluate: 8 x 512 tokens a forward pass; about ")
    small = toy.config(), ElasticSpace.build(toy.config())
    assert line("importance", arch=small[0], space=small[1]).startswith(
        f"importance: 8 x {toy.LENGTH} tokens a forward pass; about "
    )


def test_logits_no_longer_need_most_of_the_memory(monkeypatch):
    """131,072 positions would need 538 GB of logits for a micro-batch of 8 in one piece."""
    found = []
    monkeypatch.setattr(memory, "machine_memory", lambda: 2**50)
    monkeypatch.setattr(memory, "show", lambda name, value: found.append(value) or "")
    line("evaluate")
    assert found[0] < 10 * 2**30


@pytest.mark.parametrize(
    ("stage", "advice"),
    [
        ("elastic", "lower model.micro_batch_size or model.seq_length"),
        ("evaluate", "lower model.micro_batch_size or model.seq_length"),
        ("latency", "lower setting.batch_size or setting.prompt_length"),
    ],
)
def test_too_much_is_refused(monkeypatch, stage, advice):
    monkeypatch.setattr(memory, "machine_memory", lambda: 2**30)
    with pytest.raises(
        FlextronError, match=rf"{stage}: needs about .* GiB of memory on a rank, of 1 GiB, \d+% of it for .*{advice}"
    ):
        line(stage)


def test_this_machine_has_memory():
    assert machine_memory() > 2**29
