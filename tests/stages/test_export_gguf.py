"""`flextron export format=gguf`: a trained network with its tokenizer continues text in llama.cpp."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.space import count_parameters
from tests import toy
from tests.exports.conftest import engine  # noqa: F401
from tests.stages.conftest import stage


def test_the_trained_chain_in_llama_cpp(chain, engine, tmp_path):  # noqa: F811
    info = open_checkpoint(chain / "elastic")
    net = toy.random_network(info.model, info.space, 3)
    (tmp_path / "net.json").write_text(net.to_json())
    keys = [f"checkpoint={chain}/elastic", f"subnetwork={tmp_path}/net.json"]
    figures = stage("export", *keys, "format=gguf", f"out={tmp_path}/gguf")
    assert figures["parameters"] == count_parameters(info.model, net) and figures["max_logit_difference"] < 1e-5
    stage("export", *keys, f"out={tmp_path}/hf", "verify=false")
    running = engine(tmp_path / "gguf" / "model.gguf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    for text in ("def main(", "  import", "The quick, brown fox"):
        prompt = tokenizer(text, return_tensors="pt")
        ids = prompt.input_ids[0].tolist()
        assert running.tokenize(text, add_bos=True) == ids
        length = info.model.max_position_embeddings - len(ids)
        expected = theirs.generate(**prompt, max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert running.greedy(ids, length) == expected[0, len(ids) :].tolist()


@pytest.mark.parametrize("kind, most", [("f16", 0.05), ("q8_0", 1.0)])
def test_narrower_types_are_verified(chain, kind, most, tmp_path):
    figures = stage("export", f"checkpoint={chain}/elastic", "format=gguf", f"gguf.type={kind}", f"out={tmp_path}/out")
    assert 0 < figures["max_logit_difference"] < most
