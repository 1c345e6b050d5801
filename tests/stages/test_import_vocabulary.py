"""`flextron import` of a model whose tokenizer has more tokens than the model has rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.data import tokenizer as tokenizers
from flextron_mcore.data.blend import open_data
from flextron_mcore.settings.sections import EvaluationModelSettings
from flextron_mcore.training.checks import sequence_length
from tests import hf_toy
from tests.stages.conftest import stage


@pytest.fixture(scope="module")
def source(tmp_path_factory, text) -> Path:
    """Directory of a model that lacks rows for the last two tokens of its tokenizer."""
    folder = tmp_path_factory.mktemp("hf")
    trained = tokenizers.train_tokenizer([file.read_text() for file in sorted(text.rglob("*")) if file.is_file()], 300)
    hf_toy.save(hf_toy.llama(vocab_size=trained.vocab_size - 2), folder)
    trained.save(folder)
    return folder


def test_the_token_is_named_and_rows_are_added(source, text, tmp_path, capsys):
    (token,) = [token for token, i in tokenizers.read_vocabulary(source).tokens.items() if i == 298]
    stage("import", f"hf={source}", f"out={tmp_path}/small")
    said = " ".join(capsys.readouterr().out.split())
    assert f"the tokenizer has the token {token!r} with id 298, and the model only rows 0 to 297: import with" in said
    metrics = stage("import", f"hf={source}", f"out={tmp_path}/large", "resize_vocabulary=true", "verify=true")
    assert metrics["model"]["vocab_size"] == 300 and metrics["max_logit_difference"] < 1e-4
    stage("prepare", f"input={text}/prose", f"tokenizer={source}", f"out={tmp_path}/data")
    data, model = open_data(tmp_path / "data"), EvaluationModelSettings(seq_length=16)
    assert sequence_length(model, open_checkpoint(tmp_path / "large"), data) == 16
    with pytest.raises(FlextronError) as caught:
        sequence_length(model, open_checkpoint(tmp_path / "small"), data)
    words = (
        f"its tokenizer has 300 tokens, the model's vocabulary 298, the first one beyond is {token!r} with id 298: import it with"
    )
    assert words in str(caught.value)


def test_a_tokenizer_that_fits_changes_nothing(source, tmp_path, capsys):
    fitting = hf_toy.save(hf_toy.llama(vocab_size=320), tmp_path / "hf")
    tokenizers.open_tokenizer(source).save(fitting)
    metrics = stage("import", f"hf={fitting}", f"out={tmp_path}/out", "resize_vocabulary=true")
    assert metrics["model"]["vocab_size"] == 320 and "the tokenizer has the token" not in capsys.readouterr().out
    for name in ("tokenizer.json", "vocab.json"):
        (fitting / name).unlink(missing_ok=True)
    with pytest.raises(FlextronError, match="has no tokenizer.json or vocab.json, which count the tokens: leave it out"):
        stage("import", f"hf={fitting}", f"out={tmp_path}/none", "resize_vocabulary=true")


@pytest.mark.parametrize(
    "content, package", [(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", "sentencepiece"), (b"IQ== 0\nIg== 1\n", "tiktoken")]
)
def test_the_package_of_a_tokenizer_model(tmp_path, monkeypatch, content, package):
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    monkeypatch.setattr(tokenizers, "find_spec", lambda name: None)
    with pytest.raises(FlextronError, match=f"needs the package {package}, which is not installed: pip install {package}"):
        tokenizers.open_tokenizer(tmp_path)
