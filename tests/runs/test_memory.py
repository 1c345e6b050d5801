"""Line in which every stage says how much memory it needs, and the refusal of what the machine cannot hold."""

from __future__ import annotations

import pytest

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.latency.measure import Setting
from flextron_mcore.runs import memory
from flextron_mcore.runs.memory import machine_memory, memory_line
from flextron_mcore.settings.compose import compose
from flextron_mcore.space import ElasticSpace, SubNetwork, count_parameters, kv_cache_bytes, weight_bytes
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
    """Logits are computed in chunks: in one piece, those of a micro-batch of 8 with 131,072 positions would need 538 GB."""
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


def generated(*keys: str, lengths=(100, 4000)) -> str:
    return memory.generation_line(compose("generate", ["checkpoint=c", *keys]), CheckpointInfo(LLAMA, SPACE), "bf16", lengths)


def exported(*keys: str, net=None) -> str:
    settings = compose("export", ["checkpoint=c", "out=o", *keys])
    return memory.comparison_line(settings, CheckpointInfo(LLAMA, SPACE, dtype="bf16"), net or SubNetwork.full(LLAMA))


def test_generation_counts_weights_and_cache(monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 2**40)
    sizes = []
    monkeypatch.setattr(memory, "show", lambda name, value: sizes.append(value) or "")
    assert generated().startswith("generate: 2 prompt(s), up to 4064 tokens each; about ")
    weights, cache = weight_bytes(LLAMA), kv_cache_bytes(LLAMA, None, 2, 4064)
    assert weights + cache < sizes[0] < 1.2 * (weights + cache)
    generated(lengths=(100,) * 8)
    assert sizes[2] - sizes[0] > kv_cache_bytes(LLAMA, None, 8, 164) - cache


def timed(setting: Setting) -> str:
    return memory.timing_line(compose("select", ["checkpoint=c", "budget=0.5"]), CheckpointInfo(LLAMA, SPACE), "bf16", setting)


def test_measuring_a_choice_counts_what_the_latency_table_counts(monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 2**40)
    sizes = []
    monkeypatch.setattr(memory, "show", lambda name, value: sizes.append(value) or "")
    for kind, generated_tokens in (("prefill", 1), ("generation", 64)):
        said = timed(Setting(kind, 4, 2048, generated_tokens))
        assert said.startswith("select: 4 x 2048 tokens, to measure latencies; about ")
        keys = [f"setting.kind={kind}", "setting.batch_size=4", "setting.prompt_length=2048"]
        line("latency", *keys, *([f"setting.generated_tokens={generated_tokens}"] if kind == "generation" else []))
        assert sizes[0] == pytest.approx(sizes[2], rel=1e-3)
        sizes.clear()


def test_an_import_that_is_compared_counts_the_model_in_fp32(monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 2**40)
    sizes = []
    monkeypatch.setattr(memory, "show", lambda name, value: sizes.append(value) or "")
    assert imported().startswith("import: the model in fp32, to compare it with transformers; about ")
    assert sizes[0] == 4 * count_parameters(LLAMA)
    assert imported("verify=false").startswith("import: a few tensors at a time; about ")


def imported(*keys: str) -> str:
    settings = compose("import", ["hf=h", "out=o", "verify=true", *keys])
    return memory.import_line(settings, CheckpointInfo(LLAMA, SPACE, dtype="bf16"))


def test_an_export_counts_both_models_in_fp32_unless_nothing_is_compared(monkeypatch):
    monkeypatch.setattr(memory, "machine_memory", lambda: 2**40)
    sizes = []
    monkeypatch.setattr(memory, "show", lambda name, value: sizes.append(value) or "")
    small = SPACE.uniform(LLAMA, SPACE.heads[0], SPACE.ffn_hidden_size[0])
    assert exported(net=small).startswith("export: checkpoint and export in fp32, to compare their logits; about ")
    assert sizes[0] == 4 * (count_parameters(LLAMA) + count_parameters(LLAMA, small))
    assert exported("verify=false").startswith("export: a few tensors at a time; about ")
    assert sizes[2] == 6 * 2 * 128_256 * 2048  # six times the embedding in bf16


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (generated, "lower max_new_tokens, or give fewer prompts"),
        (exported, "set verify=false"),
        (imported, "leave verify=true out"),
        (lambda: timed(Setting("prefill", 1, 128)), "set measure=false"),
        (lambda: exported("verify=false"), "start fewer ranks"),
    ],
)
def test_too_much_for_other_stages_is_refused(monkeypatch, make, advice):
    monkeypatch.setattr(memory, "machine_memory", lambda: 2**30)
    with pytest.raises(
        FlextronError, match=rf"needs about .* GiB of memory on a rank, of 1 GiB, for .*: {advice}, or use more ranks"
    ):
        make()


def test_this_machine_has_memory():
    assert machine_memory() > 2**29
