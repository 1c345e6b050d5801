"""Small tokenizers, each with the exact pipeline of a well-known one, and texts that are hard to split."""

from __future__ import annotations

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase

from flextron_mcore.data.tokenizer import Tokenizer
from flextron_mcore.exports.gguf import tokenizer
from tests import tricky_texts

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
    """Fixed texts, random ones of few characters, and Python source."""
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
    """Tokenizer like Llama 2's: pieces learnt by BPE, and merges as transformers derives them from sentencepiece.

    prefix: where the space in front of a text is added: "normalizer", or a prepend_scheme of Metaspace.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt = json.loads(trained(backend, 400).to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["".join(merge) for merge in learnt["merges"] if "▁▁" not in "".join(merge)]
    runs = ["▁" * length for length in (2, 4, 8, 5, 6, 3, 7)]  # runs of spaces, which merge last and independently
    singles = [piece for piece in learnt["vocab"] if len(piece) == 1 and piece != "🙂"]  # without it, bytes spell the emoji
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys([*pieces, *runs, *words, *singles]))}
    halves = lambda piece: [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]  # noqa: E731
    merges = [pair for piece in dict.fromkeys(words) for pair in halves(piece) if vocab.keys() >= set(pair)]
    merges += sorted((pair for piece in runs for pair in halves(piece)), key=lambda pair: [-len(half) for half in pair])
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    if prefix == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    return with_bos(backend)


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def qwen() -> tokenizers.Tokenizer:
    words = pre_tokenizers.Split(Regex(QWEN), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = byte_level(pre_tokenizers.Sequence([words, bytes_]))
    backend.normalizer, backend.post_processor = normalizers.NFC(), processors.ByteLevel(trim_offsets=False)
    return backend


def hard_texts() -> list[str]:
    """Texts of tests/tricky_texts.py, and random mixtures of their characters."""
    draw = random.Random(1)
    alphabet = [*ALPHABET, *tricky_texts.TRICKY["lines"], *tricky_texts.TRICKY["special"][:9], "  ", "\r\n"]
    return [*TEXTS, *tricky_texts.TEXTS, *("".join(draw.choices(alphabet, k=draw.randint(1, 30))) for _ in range(100))]


def check_continuation(opened: Tokenizer, theirs: PreTrainedTokenizerBase, ids: list[int], cut: int) -> None:
    """Assert that the text of a prompt, ids[:cut], and its continuation are transformers' text of all ids.

    Of the prompt's text, only replacement characters may be left out, which stand for bytes of an incomplete character.
    """
    exact = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    before, whole = theirs.decode(ids[:cut], **exact), theirs.decode(ids, **exact)
    found = opened.continuation(ids[:cut], ids[cut:])
    assert whole.endswith(found)
    kept = whole[: len(whole) - len(found)]
    assert before.startswith(kept) and not before[len(kept) :].strip("\ufffd")
