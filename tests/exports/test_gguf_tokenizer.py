"""Tokenizers in GGUF files: llama.cpp gives the ids that `tokenizers` gives with the exported tokenizer.json."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from gguf import GGUFReader
from tokenizers import models
from transformers.convert_slow_tokenizer import import_protobuf

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.data.tokenizer import train_tokenizer
from flextron_mcore.exports import gguf as export
from flextron_mcore.exports.formats import Job
from flextron_mcore.exports.gguf import tokenizer
from flextron_mcore.space import SubNetwork
from tests import hf_toy, tricky_texts
from tests.tokenizer_kinds import SOURCE, TEXTS, gpt2, llama2, llama3, qwen, save, smollm, texts


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> CheckpointInfo:
    """Tiny Llama with 700 tokens, more than any tokenizer here has."""
    folder = tmp_path_factory.mktemp("model")
    small = dict(vocab_size=700, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    return hf_toy.checkpoint(hf_toy.save(hf_toy.llama(**small, num_key_value_heads=2), folder / "hf"), folder / "run")


def exported(info: CheckpointInfo, folder: Path, out: Path) -> Path:
    out.mkdir()
    export.write(Job(info, SubNetwork.full(info.model), out, tokenizer=folder))
    return out / "model.gguf"


KINDS = {
    "gpt2": gpt2,
    "smollm": smollm,
    "llama3": llama3,
    "llama2": llama2,
    "llama2, no space in front": lambda: llama2("never"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_splits_text_as_tokenizers(kind, model, engine, tmp_path):
    backend = KINDS[kind]()
    running = engine(exported(model, save(backend, tmp_path / "tokenizer"), tmp_path / "out"))
    different = []
    for text in texts():
        for special in (False, True):
            if running.tokenize(text, add_bos=special) != backend.encode(text, add_special_tokens=special).ids:
                different.append(text)
    assert not different
    assert max(running.tokenize(SOURCE)) > 256  # ids above the 256 bytes: merges happen
    chat = "<s>Hello</s>"
    assert running.tokenize(chat, special=True) == backend.encode(chat, add_special_tokens=False).ids
    ids = backend.encode(TEXTS[8], add_special_tokens=False).ids
    assert running.model.detokenize(ids).decode().lstrip() == TEXTS[8]  # characters without a piece come back from bytes
    assert (running.model.token_eos(), running.model.token_bos()) == (backend.token_to_id("</s>"), backend.token_to_id("<s>"))


def test_a_space_in_front_that_only_some_texts_get(model, engine, tmp_path):
    """Texts that begin with a space are left out: llama.cpp, like sentencepiece, adds a space to them, Metaspace does not."""
    backend = llama2("first")
    running = engine(exported(model, save(backend, tmp_path / "tokenizer"), tmp_path / "out"))
    for text in texts():
        if not text.startswith(" "):
            assert running.tokenize(text) == backend.encode(text, add_special_tokens=False).ids, text


def test_qwen_without_its_normalisation(model, engine, tmp_path):
    """Texts in other forms than NFC are left out: Qwen's tokenizer normalises them, llama.cpp does not."""
    backend = qwen()
    running = engine(exported(model, save(backend, tmp_path / "tokenizer"), tmp_path / "out"))
    found = [text for text in (*texts(), *tricky_texts.TEXTS) if unicodedata.is_normalized("NFC", text) and "\0" not in text]
    assert len(found) > 400
    for text in found:
        assert running.tokenize(text, special=True) == backend.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("size", [257, 500])
def test_the_tokenizer_of_prepare_gives_the_same_ids(size, model, engine, tmp_path):
    ours = train_tokenizer([SOURCE], size)  # size 257 leaves no room for merges
    ours.save(tmp_path / "tokenizer")
    running = engine(exported(model, tmp_path / "tokenizer", tmp_path / "out"))
    for text, ids in zip(texts(), ours.encode_batch(texts()), strict=True):
        assert [*running.tokenize(text, add_bos=True), ours.eod] == ids.tolist(), text
    assert running.model.token_eos() == ours.eod


def sentencepiece(backend: tokenizers.Tokenizer, folder: Path, model_type: int = 2) -> Path:
    """Directory with the sentencepiece tokenizer.model that corresponds to `backend`, a tokenizer of `llama2()`."""
    values = json.loads(backend.to_str())["model"]
    proto = import_protobuf().ModelProto()
    proto.trainer_spec.model_type = model_type
    proto.normalizer_spec.add_dummy_prefix, proto.normalizer_spec.remove_extra_whitespaces = True, False
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    for piece, i in sorted(values["vocab"].items(), key=lambda entry: entry[1]):
        score = -1e9 if set(piece) == {"▁"} else -float(i)  # runs of spaces merge last, as in Llama 2's model
        proto.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return folder


def test_a_sentencepiece_model_alone_gives_the_same_ids(model, engine, tmp_path):
    backend = llama2()
    running = engine(exported(model, sentencepiece(backend, tmp_path / "tokenizer"), tmp_path / "out"))
    for text in texts():
        assert running.tokenize(text, add_bos=True) == backend.encode(text).ids, text
    with pytest.raises(FlextronError, match="its sentencepiece model is not BPE"):
        tokenizer.read(sentencepiece(backend, tmp_path / "unigram", model_type=1), 700)


def test_metadata_has_unique_tokens_and_the_chat_template(model, tmp_path):
    """Ids without a token get unique names, and the chat template is copied."""
    backend = gpt2()
    file = exported(model, save(backend, tmp_path / "tokenizer", chat_template="{{ messages }}"), tmp_path / "out")
    fields = GGUFReader(file).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(set(tokens)) == 700 and tokens[:500] == [backend.id_to_token(i) for i in range(500)]
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[:3] == [3, 3, 3] and set(types[3:500]) == {1} and set(types[500:]) == {5}
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert 'llama-cli -m model.gguf -p "The"' in (tmp_path / "out" / "README.md").read_text()


def changed(**changes) -> dict:
    """tokenizer.json of a tiny byte-level BPE with `changes`."""
    values = json.loads(
        tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2, "</s>": 3}, merges=[("a", "b")])).to_str()
    )
    values["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = values["model"] | changes.pop("model", {})
    return values | {"model": model} | changes


BYTES = {f"<0x{byte:02X}>": 10 + byte for byte in range(256)}
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def pieces(vocab: list[str], merges: list[str]) -> dict:
    """tokenizer.json of a sentencepiece BPE with these pieces and merges."""
    model = {"vocab": {piece: i for i, piece in enumerate(vocab)} | BYTES, "merges": merges, "byte_fallback": True}
    return changed(model=model, pre_tokenizer=None, normalizer={"type": "Sequence", "normalizers": [PREPEND, REPLACE]})


ADDED = {"id": 4, "content": "<x>", "single_word": False, "lstrip": True, "rstrip": False, "normalized": False, "special": False}
REFUSED = {
    "its model is WordPiece, not BPE": changed(model={"type": "WordPiece"}),
    "dropout=0.1": changed(model={"dropout": 0.1}),
    "end_of_word_suffix='</w>'": changed(model={"end_of_word_suffix": "</w>"}),
    "its token '<x>' has lstrip": changed(added_tokens=[ADDED]),
    "it changes text before splitting it (normalizer NFC)": changed(normalizer={"type": "NFC"}),
    "its pre-tokenizer (Whitespace) is not": changed(pre_tokenizer={"type": "Whitespace"}),
    "its pre-tokenizer (ByteLevel) is not": changed(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}),
    "its pre-tokenizer (none) is not": changed(pre_tokenizer=None),
    "ignore_merges=True with the pre-tokenizer gpt-2": changed(model={"ignore_merges": True}),
    "its post-processor is BertProcessing": changed(post_processor={"type": "BertProcessing"}),
    "the model has 700 rows, none for its token 'a' with id 900": changed(model={"vocab": {"a": 900}, "merges": []}),
    "two of its tokens have the same id": changed(model={"vocab": {"a": 1, "b": 1}, "merges": []}),
    "it lacks the byte <0x00>": changed(model={"byte_fallback": True}, pre_tokenizer=None, normalizer=REPLACE),
    "it does not write spaces as": pieces([], []) | {"normalizer": None},
    "it does not merge 'ab' and 'c' into 'abc'": pieces(["a", "b", "c", "ab", "bc", "abc"], ["a b", "b c", "a bc"]),
    "its merges into 'abc' and into 'bc' take turns": pieces(["a", "b", "c", "ab", "bc", "abc"], ["a b", "ab c", "b c", "a bc"]),
    "no end-of-text token (eos_token": changed(model={"vocab": {"a": 0}, "merges": []}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_tokenizers_that_llama_cpp_lacks_are_refused(words, model, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(REFUSED[words]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(FlextronError) as caught:
        exported(model, folder, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"tokenizer={folder}: ") and words in message and "\n" not in message
    assert not list((tmp_path / "out").iterdir())


def test_files_that_are_no_tokenizer_are_refused(tmp_path):
    with pytest.raises(FlextronError, match="no tokenizer in it that GGUF can hold"):
        tokenizer.read(tmp_path, 700)
    for content in ("{", "[]", '{"model": {"type": "BPE"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(FlextronError, match=r"tokenizer.json: is not a tokenizer \("):
            tokenizer.read(tmp_path, 700)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\xff\xff")
    with pytest.raises(FlextronError, match=r"tokenizer.model: is not a tokenizer \("):
        tokenizer.read(tmp_path, 700)
