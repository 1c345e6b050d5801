"""Words in the tables that stages print."""

from __future__ import annotations

from tests.stages.conftest import stage

MEMORY = "memory: weights and KV cache of 2 x 16 tokens in fp32"
CACHE = ["kv_cache.batch_size=2", "kv_cache.length=16"]


def test_tables_say_what_memory_counts(chain, tmp_path, capsys):
    keys = [f"checkpoint={chain}/elastic", "selector=uniform", *CACHE]
    stage("select", *keys, "budget=0.9 memory")
    assert MEMORY in capsys.readouterr().out
    stage("family", *keys, "budgets=[0.9 memory]", "formats=[]", f"out={tmp_path}/family")
    assert f"what each budget gets ({MEMORY})" in capsys.readouterr().out
    more = ["selectors=[uniform]", "cost=memory", "limit_val_batches=1", "random_at_target=0", f"data={chain}/data"]
    stage("compare", keys[0], *CACHE, *more, f"out={tmp_path}/compare")
    assert MEMORY in " ".join(capsys.readouterr().out.split())


def test_a_budget_above_the_full_model_is_shown_as_it_was_typed(chain, capsys):
    found = stage("select", f"checkpoint={chain}/elastic", "selector=uniform", "budget=8GiB")
    printed = capsys.readouterr().out
    assert found["costs"]["memory"]["share"] == 1
    assert "warning: budget memory <= 8 GiB allows the full model" in printed
    [row] = [line for line in printed.splitlines() if "weights and KV cache" in line]
    assert "8 GiB" in row


def test_heads_are_counted_where_half_of_them_is_no_candidate(chain, tmp_path, capsys):
    model = ["num_layers=1", "hidden_size=72", "num_attention_heads=9", "num_query_groups=3", "ffn_hidden_size=64"]
    keys = [*model, "max_position_embeddings=32", "micro_batch_size=2", "global_batch_size=2"]
    training = ["trainer.max_steps=1", "trainer.limit_val_batches=1", "trainer.val_at_start=false"]
    stage("pretrain", f"data={chain}/data", *(f"model.{key}" for key in keys), *training, f"out={tmp_path}/parent")
    sorting = ["samples=4", "ablation_batches=1", f"out={tmp_path}/sorted"]
    stage("importance", f"checkpoint={tmp_path}/parent", f"data={chain}/data", *sorting)
    printed = capsys.readouterr().out
    assert "3 of 9 heads" in printed and "32 of 64 FFN neurons" in printed and "50% heads" not in printed
    assert "importance: 0 of 1 batches" in printed
