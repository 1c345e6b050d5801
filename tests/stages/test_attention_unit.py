"""`importance space.attention_unit=auto` sorts by both units, compares losses on the same text, and writes the better order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flextron_mcore.checkpoint.reader import TensorReader
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from tests import hf_toy
from tests.stages.conftest import stage

HEADS, GROUPS = 9, 3
# {unit that costs nothing to drop: query heads without weights in the output projection}: a KV group, or a head of each group.
UNUSED = {"kv_group": (3, 4, 5), "query_head": (1, 5, 6)}


@pytest.fixture(scope="module")
def parents(chain, tmp_path_factory) -> Path:
    """Directory with an imported model for each unit of UNUSED, and `one_head`, whose KV groups have one query head each."""
    run = tmp_path_factory.mktemp("units")
    vocab_size = open_checkpoint(chain / "parent").model.vocab_size
    for name in (*UNUSED, "one_head"):
        torch.manual_seed(1)  # with this seed, models lose more with fewer heads; with others they may lose less
        model = hf_toy.llama(
            hidden_size=36,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS if name == "one_head" else GROUPS,
            vocab_size=vocab_size,
        )
        for layer in model.model.layers:
            for head in UNUSED.get(name, ()):
                layer.self_attn.o_proj.weight.data[:, 8 * head : 8 * (head + 1)] = 0
        hf_toy.save(model, run / f"{name}_hf")
        stage("import", f"hf={run}/{name}_hf", "verify=false", f"out={run}/{name}")
    return run


def sort(chain: Path, parent: Path, out: Path, *given: str, unit: str = "auto") -> dict:
    keys = [f"checkpoint={parent}", f"data={chain}/data", "samples=8", "ablation_batches=2", "ablation_random=false"]
    keys += ["model.micro_batch_size=4", "model.seq_length=16", "space.granularity=1", "space.heads=[6]"]
    return stage("importance", *keys, f"space.attention_unit={unit}", *given, f"out={out}")


@pytest.mark.parametrize("free", UNUSED)
def test_the_unit_that_loses_less_is_chosen(chain, parents, tmp_path, capsys, free):
    """Losses are those of a run with each unit, and the checkpoint is the one of the better run."""
    found = sort(chain, parents / free, tmp_path / "auto")
    line = next(line for line in capsys.readouterr().out.splitlines() if "space.attention_unit=" in line)
    single = {}
    for unit in UNUSED:
        rows = sort(chain, parents / free, tmp_path / unit, unit=unit)["ablation"]
        full, six = ([row["loss"] for row in rows if row["setup"].startswith(name)] for name in ("full", "6 of 9"))
        single[unit] = six[-1]
        if unit == free:
            assert six[-1] == pytest.approx(full[0], abs=1e-6)
        else:
            assert abs(six[-1] - full[0]) > 1e-4
    [(kv_group,), (query_head,)] = found["attention_units"].values()
    assert {"kv_group": kv_group["loss"], "query_head": query_head["loss"]} == single
    better = min(single, key=single.get)
    assert found["space"]["attention_unit"] == better and f"space.attention_unit={better}:" in line
    assert f"6 of 9 heads by kv_group {single['kv_group']:.3f}; 6 of 9 heads by query_head" in line
    assert found["ablation"] == json.loads((tmp_path / better / "metrics.json").read_text())["ablation"]
    chosen, alone = (open_checkpoint(tmp_path / name) for name in ("auto", better))
    assert chosen.space == alone.space
    a, b = TensorReader(chosen), TensorReader(alone)
    assert a.keys() == b.keys() and all(torch.equal(a.stored(key), b.stored(key)) for key in a.keys())
    assert sorted(path.name for path in (tmp_path / "auto").iterdir()) == sorted(p.name for p in (tmp_path / better).iterdir())


def test_both_parents_choose_differently(chain, parents, tmp_path):
    units = [sort(chain, parents / free, tmp_path / free)["space"]["attention_unit"] for free in UNUSED]
    assert units == list(UNUSED)


def test_compensated_heads_are_compared_with_groups(chain, parents, tmp_path):
    """score.heads=compensated serves the unit query_head only, and KV groups stay without compensation."""
    found = sort(chain, parents / "kv_group", tmp_path / "auto", "score.heads=compensated")
    groups, heads = (rows[0]["score"] for rows in found["attention_units"].values())
    assert (groups, heads) == ("energy", "compensated")
    assert open_checkpoint(tmp_path / "auto").space.compensation == (found["space"]["attention_unit"] == "query_head")


def test_a_single_unit_is_taken(chain, parents, tmp_path, capsys):
    assert sort(chain, parents / "one_head", tmp_path / "a")["space"]["attention_unit"] == "kv_group"
    assert "attention_unit=kv_group: this model and these candidates allow no comparison" in capsys.readouterr().out
    with pytest.raises(FlextronError, match=r"score\.heads=compensated: "):
        sort(chain, parents / "one_head", tmp_path / "b", "score.heads=compensated")
    assert sort(chain, parents / "kv_group", tmp_path / "c", "space.heads=[9]")["space"]["heads"] == [9]


def test_a_choice_without_evaluation_is_refused(chain, parents, tmp_path):
    with pytest.raises(FlextronError, match="attention_unit=auto: compares losses: set ablation_batches to at least 1"):
        sort(chain, parents / "kv_group", tmp_path / "a", "ablation_batches=0")
    with pytest.raises(FlextronError, match="attention_unit='auto' is not known: use one of kv_group, query_head"):
        stage("import", f"hf={parents}/kv_group_hf", "space.attention_unit=auto", f"out={tmp_path}/b")
    assert not any(tmp_path.iterdir())
