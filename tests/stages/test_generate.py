"""`flextron generate`: text, figures in the result, and refusals."""

from __future__ import annotations

import json

import pytest

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.data.tokenizer import open_tokenizer
from tests import toy
from tests.stages.conftest import stage


def test_texts_go_on_and_are_counted(chain, tmp_path, capsys):
    info = open_checkpoint(chain / "elastic")
    (tmp_path / "net.json").write_text(toy.random_network(info.model, info.space, 3).to_json())
    (tmp_path / "prompts.txt").write_text("def main(\n\nimport torch\n")
    keys = [f"checkpoint={chain}/elastic", "max_new_tokens=5"]
    whole = stage("generate", *keys, f"prompts={tmp_path}/prompts.txt", f"out={tmp_path}/sub/texts.json")
    assert [row["prompt"] for row in whole["texts"]] == ["def main(", "import torch"]
    assert json.loads((tmp_path / "sub" / "texts.json").read_text()) == whole and "share" not in whole
    printed = capsys.readouterr().out
    for row in whole["texts"]:
        assert row["prompt"] + row["continued"] in printed
        alone = stage("generate", *keys, f"prompt='{row['prompt']}'")["texts"][0]
        assert alone["continued"] == row["continued"]
    tokenizer = open_tokenizer(info.tokenizer)
    assert whole["tokens"] <= 10 and whole["ms_per_token"] > 0 and tokenizer.encode_batch(["x"])[0][-1] == tokenizer.eod
    part = stage("generate", *keys, f"subnetwork={tmp_path}/net.json", "prompt=x")
    assert part["subnetwork"] == info.network(tmp_path / "net.json").to_dict()
    budget = stage("generate", *keys, "selector=uniform", "budget=0.9 parameters", "prompt=x")
    assert budget["cost"] == "parameters" and budget["share"] <= 0.9


def test_bad_input_is_refused(chain, tmp_path):
    keys = [f"checkpoint={chain}/elastic", "prompt=x", "max_new_tokens=5"]
    for more, message in (
        (["max_new_tokens=100"], "max_new_tokens=100: with a prompt of 1 tokens that is more than the model's 32 positions"),
        (["max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        (["prompts=a.txt"], "give one of prompt=, a text or a list of them, and prompts="),
        (["prompt=null"], "give one of prompt=, a text or a list of them, and prompts="),
        (["prompt=[]"], "there is no prompt"),
        (["prompt=null", f"prompts={tmp_path}/none.txt"], "none.txt: cannot be read as text"),
        (["model.sequence_parallel=true"], "model.sequence_parallel=false"),
        (["model.pipeline_model_parallel_size=2"], "model.pipeline_model_parallel_size=1"),
        (["budget=0.9 parameters", "subnetwork=net.json"], "two ways to say which network"),
        (["budget=0.9 parameters"], "has no routers"),
        (
            ["budget=0.9 parameters", "selector=random"],
            "write a network with `flextron select selector=random`, and give that file",
        ),
        (["tokenizer=nowhere"], "tokenizer=nowhere: no such directory"),
        ([f"out={tmp_path}"], "is a directory; name a file"),
    ):
        with pytest.raises(FlextronError, match=message):
            stage("generate", *keys, *more)
    assert not list(tmp_path.iterdir())
