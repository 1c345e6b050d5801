"""Tokenizers in GGUF files: llama.cpp splits text as tokenizers does with the tokenizer.json that was exported."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
from gguf import GGUFReader
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import import_protobuf

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.data.tokenizer import train_tokenizer
from flextron_mcore.exports import gguf as export
from flextron_mcore.exports.formats import Job
from flextron_mcore.exports.gguf import tokenizer
from flextron_mcore.space import SubNetwork
from tests import hf_toy

SOURCE = Path(tokenizer.__file__).read_text()
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "two  spaces   three\n\n\nlines\r\n\tand tabs \n",
    "  led by spaces",
    "I'll say it's WE'VE y'all they'd 'tis",
    "1 22 333 4444 1234567 3.14 x86_64",
    "naïve café Straße Ελληνικά Привет 你好，世界 こんにちは",
    "emoji 🙂🙂 👩‍👩‍👧 ∑∞≠",
    "def main(argv: list[str]) -> int:\n    return len(argv) # end\n",
    "aaaaaaa bbbbbbb ababab   ",
    "a\u00a0b\u2003c\u3000d",
]
ALPHABET = "ab Eet'19\n\t .,(_é你🙂-s"


def texts(seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return TEXTS + ["".join(draw.choices(ALPHABET, k=draw.randint(1, 40))) for _ in range(200)] + [SOURCE[:3000]]


def save(backend: tokenizers.Tokenizer, folder: Path, **config) -> Path:
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>", **config}))
    return folder


def trained(backend: tokenizers.Tokenizer, size: int, **options) -> tokenizers.Tokenizer:
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, **options)
    backend.train_from_iterator([SOURCE, *TEXTS], trainer)
    return backend


def byte_level(pre: pre_tokenizers.PreTokenizer, ignore_merges: bool = False) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    return trained(backend, 500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def with_bos(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    return backend


def gpt2() -> tokenizers.Tokenizer:
    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))


def smollm() -> tokenizers.Tokenizer:
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    return byte_level(pre_tokenizers.Sequence(steps))


def llama3() -> tokenizers.Tokenizer:
    words = pre_tokenizers.Split(Regex(tokenizer._LLAMA3), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return with_bos(byte_level(pre_tokenizers.Sequence([words, bytes_]), ignore_merges=True))


def llama2(prefix: str = "normalizer") -> tokenizers.Tokenizer:
    """Pieces learnt by BPE, then what transformers makes of a sentencepiece model: every pair that reads as a piece merges."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt = json.loads(trained(backend, 400).to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["".join(merge) for merge in learnt["merges"] if "▁▁" not in "".join(merge)]
    runs = ["▁" * length for length in (2, 4, 8, 5, 6, 3, 7)]  # that merge last, none before the other
    singles = [piece for piece in learnt["vocab"] if len(piece) == 1 and piece != "🙂"]  # which bytes must spell
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *runs, *words, *singles]))}
    halves = lambda piece: [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]  # noqa: E731
    merges = [pair for piece in dict.fromkeys(words) for pair in halves(piece) if vocab.keys() >= set(pair)]
    merges += sorted((pair for piece in runs for pair in halves(piece)), key=lambda pair: [-len(half) for half in pair])
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    if prefix == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    return with_bos(backend)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> CheckpointInfo:
    """600 tokens: more than any tokenizer here has."""
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
    assert max(running.tokenize(SOURCE)) > 256  # merges happen
    chat = "<s>Hello</s>"
    assert running.tokenize(chat, special=True) == backend.encode(chat, add_special_tokens=False).ids
    ids = backend.encode(TEXTS[8], add_special_tokens=False).ids
    assert running.model.detokenize(ids).decode().lstrip() == TEXTS[8]  # from bytes, where it has no pieces
    assert (running.model.token_eos(), running.model.token_bos()) == (backend.token_to_id("</s>"), backend.token_to_id("<s>"))


def test_a_space_in_front_that_only_some_texts_get(model, engine, tmp_path):
    """Metaspace adds none to a text that begins with a space; llama.cpp, as sentencepiece, does."""
    backend = llama2("first")
    running = engine(exported(model, save(backend, tmp_path / "tokenizer"), tmp_path / "out"))
    for text in texts():
        if not text.startswith(" "):
            assert running.tokenize(text) == backend.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("size", [257, 500])
def test_our_own_tokenizer(size, model, engine, tmp_path):
    ours = train_tokenizer([SOURCE], size)  # 257: bytes alone, no merges
    ours.save(tmp_path / "tokenizer")
    running = engine(exported(model, tmp_path / "tokenizer", tmp_path / "out"))
    for text, ids in zip(texts(), ours.encode_batch(texts()), strict=True):
        assert [*running.tokenize(text, add_bos=True), ours.eod] == ids.tolist(), text
    assert running.model.token_eos() == ours.eod


def sentencepiece(backend: tokenizers.Tokenizer, folder: Path, model_type: int = 2) -> Path:
    """The tokenizer.model that `llama2()` comes from."""
    values = json.loads(backend.to_str())["model"]
    proto = import_protobuf().ModelProto()
    proto.trainer_spec.model_type = model_type
    proto.normalizer_spec.add_dummy_prefix, proto.normalizer_spec.remove_extra_whitespaces = True, False
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3} | {f"<0x{byte:02X}>": 6 for byte in range(256)}
    for piece, i in sorted(values["vocab"].items(), key=lambda entry: entry[1]):
        score = -1e9 if set(piece) == {"▁"} else -float(i)  # of runs, as in Llama 2's
        proto.pieces.add(piece=piece, score=score, type=kinds.get(piece, 1))
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return folder


def test_a_sentencepiece_model_alone(model, engine, tmp_path):
    backend = llama2()
    running = engine(exported(model, sentencepiece(backend, tmp_path / "tokenizer"), tmp_path / "out"))
    for text in texts():
        assert running.tokenize(text, add_bos=True) == backend.encode(text).ids, text
    with pytest.raises(FlextronError, match="its sentencepiece model is not BPE"):
        tokenizer.read(sentencepiece(backend, tmp_path / "unigram", model_type=1), 700)


def test_metadata(model, tmp_path):
    """Ids without a token get names of their own, and the chat template goes along."""
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
    """tokenizer.json of the smallest byte-level BPE, with changes."""
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
    """tokenizer.json of a sentencepiece BPE."""
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
    "it has tokens up to 900, the model 700": changed(model={"vocab": {"a": 900}, "merges": []}),
    "two of its tokens have the same id": changed(model={"vocab": {"a": 1, "b": 1}, "merges": []}),
    "it lacks the byte <0x00>": changed(model={"byte_fallback": True}, pre_tokenizer=None, normalizer=REPLACE),
    "it does not write spaces as": pieces([], []) | {"normalizer": None},
    "it does not merge 'ab' and 'c' into 'abc'": pieces(["a", "b", "c", "ab", "bc", "abc"], ["a b", "b c", "a bc"]),
    "its merges into 'abc' and into 'bc' take turns": pieces(["a", "b", "c", "ab", "bc", "abc"], ["a b", "ab c", "b c", "a bc"]),
    "no end-of-text token (eos_token": changed(model={"vocab": {"a": 0}, "merges": []}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_tokenizers_that_llama_cpp_lacks(words, model, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(REFUSED[words]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    with pytest.raises(FlextronError) as caught:
        exported(model, folder, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"tokenizer={folder}: ") and words in message and "\n" not in message
    assert not list((tmp_path / "out").iterdir())


def test_files_that_are_no_tokenizer(tmp_path):
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
