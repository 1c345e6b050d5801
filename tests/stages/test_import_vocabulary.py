"""`flextron import` of a model whose tokenizer has more tokens than the model has rows."""

from __future__ import annotations

import json
import re
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


def put(file: Path, **values: object) -> None:
    """Set keys of the JSON object in a file, which need not exist."""
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **values}))


def more_in_added_tokens(folder: Path) -> None:
    stored = json.loads((folder / "tokenizer.json").read_text())["model"]
    put(folder / "vocab.json", **stored["vocab"])
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in stored["merges"]))
    put(folder / "added_tokens.json", **{"<more>": 300})
    (folder / "tokenizer.json").unlink()
    put(
        folder / "tokenizer_config.json",
        tokenizer_class="GPT2Tokenizer",
        **dict.fromkeys(("unk_token", "eos_token"), "<|endoftext|>"),
    )


def more_with_an_id_that_is_not_kept(folder: Path) -> None:
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    put(folder / "tokenizer.json", added_tokens=[*added, {**added[0], "id": 350, "content": "<more>"}])


CONFIG, MORE = "tokenizer_config.json", {"content": "<more>", "special": True}
BESIDE = {
    "pad token": lambda folder: put(folder / CONFIG, pad_token="<more>"),
    "additional special tokens": lambda folder: put(folder / CONFIG, additional_special_tokens=["<more>"]),
    "extra special tokens": lambda folder: put(folder / CONFIG, extra_special_tokens={"image_token": "<more>"}),
    "decoder": lambda folder: put(folder / CONFIG, added_tokens_decoder={"300": MORE}),
    "map": lambda folder: put(folder / "special_tokens_map.json", pad_token=MORE),
    "added_tokens.json": more_in_added_tokens,
    "id": more_with_an_id_that_is_not_kept,
}


@pytest.mark.parametrize("kind", BESIDE)
def test_tokens_that_tokenizer_json_does_not_list(kind, source, text, tmp_path, capsys):
    """Tokens that other files name, and that transformers numbers when it loads them, are printed, get rows, and are trained."""
    hf_toy.save(hf_toy.llama(vocab_size=300), tmp_path / "hf")
    tokenizers.open_tokenizer(source).save(tmp_path / "hf")
    BESIDE[kind](tmp_path / "hf")
    stage("import", f"hf={tmp_path}/hf", f"out={tmp_path}/small")
    said = " ".join(capsys.readouterr().out.split())
    assert "the tokenizer has the token '<more>' with id 300, and the model only rows 0 to 299: import with" in said
    with pytest.raises(FlextronError, match="prompt: has the token '<more>' with id 300, and the model only rows 0 to 299"):
        stage("generate", f"checkpoint={tmp_path}/small", "prompt=a<more>", "parse_special_tokens=true")
    metrics = stage("import", f"hf={tmp_path}/hf", f"out={tmp_path}/large", "resize_vocabulary=true")
    assert metrics["model"]["vocab_size"] == 301
    stage("prepare", f"input={text}/prose", f"tokenizer={tmp_path}/hf", f"out={tmp_path}/data")
    data, info = open_data(tmp_path / "data"), open_checkpoint(tmp_path / "large")
    assert sequence_length(EvaluationModelSettings(seq_length=16), info, data) == 16
    assert tokenizers.read_vocabulary(info.tokenizer).tokens == tokenizers.open_tokenizer(tmp_path / "hf").hf.get_vocab()


def test_a_padding_token_without_a_row(source, tmp_path):
    hf = hf_toy.save(hf_toy.llama(vocab_size=300), tmp_path / "hf")
    put(hf / "config.json", pad_token_id=300)
    with pytest.raises(
        FlextronError, match="config.json: pad_token_id is 300, not a row of the embedding, 0 to 299: set it to null"
    ):
        stage("import", f"hf={hf}", f"out={tmp_path}/out")
    tokenizers.open_tokenizer(source).save(hf)
    put(hf / CONFIG, pad_token="<pad>")
    stage("import", f"hf={hf}", f"out={tmp_path}/out", "resize_vocabulary=true")
    assert stage("export", f"checkpoint={tmp_path}/out", f"out={tmp_path}/export", "verify=true")["max_logit_difference"] < 1e-5


@pytest.mark.parametrize("content", ['{"eos_token": 3}', '{"added_tokens_decoder": 3}', '{"tokenizer_class": "NoSuchTokenizer"}'])
def test_rows_are_not_added_for_a_tokenizer_that_cannot_be_opened(source, tmp_path, content):
    """An import without it says nothing: the first stage that encodes text says why."""
    hf = hf_toy.save(hf_toy.llama(vocab_size=300), tmp_path / "hf")
    tokenizers.open_tokenizer(source).save(hf)
    (hf / CONFIG).write_text(content)
    try:
        tokenizers.open_tokenizer(hf)
    except FlextronError as error:
        with pytest.raises(FlextronError, match=re.escape(str(error))):
            stage("import", f"hf={hf}", f"out={tmp_path}/out", "resize_vocabulary=true")
        assert not (tmp_path / "out").exists()
    stage("import", f"hf={hf}", f"out={tmp_path}/out")


@pytest.mark.parametrize(
    "content, package", [(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02", "sentencepiece"), (b"IQ== 0\nIg== 1\n", "tiktoken")]
)
def test_the_package_of_a_tokenizer_model(tmp_path, monkeypatch, content, package):
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    monkeypatch.setattr(tokenizers, "find_spec", lambda name: None)
    with pytest.raises(FlextronError, match=f"needs the package {package}, which is not installed: pip install {package}"):
        tokenizers.open_tokenizer(tmp_path)
