"""Tokenizers: train a byte-level BPE, or open any Hugging Face tokenizer directory. Both are read and saved the same way."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..config import FlextronError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # the 256 bytes and END_OF_TEXT
_PIECE = 1 << 20  # characters; a longer document is encoded in pieces, which bounds memory and uses every core
_GROUP = 1 << 21  # characters encoded at once
_PIECE_END = re.compile(r"(?<=\S)(?=\s)")  # before whitespace: the cut that leaves GPT-style pre-tokenization as it was

_Entry = TypeVar("_Entry", bound=tuple)


@dataclass(frozen=True)
class Tokenizer:
    """A Hugging Face tokenizer with a Rust backend. `vocab_size` is the largest id + 1, `eod` the id that ends a document."""

    hf: PreTrainedTokenizerBase
    vocab_size: int
    eod: int

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (int64 [n]) of each document, its end marked by `eod`.

        Special tokens spelt out in a text are encoded as the plain text that they are.
        """
        ids: list[list[np.ndarray]] = [[] for _ in texts]
        for group in groups((i, piece) for i, text in enumerate(texts) for piece in _pieces(text)):
            encoded = self.hf.backend_tokenizer.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (i, _), encoding in zip(group, encoded, strict=True):
                ids[i].append(np.array(encoding.ids, dtype=np.int64))
        return [np.concatenate([*parts, [self.eod]]) for parts in ids]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of token ids, special tokens included."""
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face tokenizer directory that transformers 4 and 5 (and what builds on them) can load."""
        self.hf.save_pretrained(path)
        config_file = Path(path, "tokenizer_config.json")
        config = json.loads(config_file.read_text(encoding="utf-8"))
        for name in ("is_local", "local_files_only"):  # how it was opened here, not what it is
            config.pop(name, None)
        # transformers 5 has a new name for this class; it knows the old one too, which is all that 4 knows.
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        _write_json(config_file, config)
        _write_json(Path(path, "special_tokens_map.json"), {k: str(v) for k, v in self.hf.special_tokens_map.items()})


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE: every text can be encoded, and decodes to itself.

    The result is a function of the texts and `vocab_size`; it is smaller than `vocab_size` where the texts have too few words.
    Raises FlextronError when `vocab_size` is below `SMALLEST_VOCAB`.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise FlextronError(f"vocab_size={vocab_size} is too small: a byte-level tokenizer needs at least {SMALLEST_VOCAB}")
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    byte_level = tokenizers.pre_tokenizers.ByteLevel
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((piece for text in texts for piece in _pieces(text)), trainer)
    return _wrap(
        PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, clean_up_tokenization_spaces=False
        ),
        "the trained tokenizer",
    )


def open_tokenizer(path: str | Path) -> Tokenizer:
    """Open a Hugging Face tokenizer directory; nothing is downloaded, no code in it is run.

    Raises FlextronError when the directory is missing or holds no tokenizer with a Rust backend and an end-of-text token.
    """
    directory = Path(path).expanduser()
    if not directory.is_dir():
        raise FlextronError(f"tokenizer={path}: no such directory (give a directory that holds tokenizer.json)")
    from transformers import AutoTokenizer

    try:
        hf = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers, tokenizers or json raise on a directory that is not one
        reason = " ".join(str(error).split())[:200]
        raise FlextronError(f"tokenizer={path}: not a tokenizer that transformers can open: {reason}") from error
    return _wrap(hf, f"tokenizer={path}")


def _wrap(hf: PreTrainedTokenizerBase, name: str) -> Tokenizer:
    if not hf.is_fast:
        raise FlextronError(f"{name}: has no Rust backend (tokenizer.json), which encoding a corpus needs")
    if hf.eos_token_id is None:
        raise FlextronError(f"{name}: has no end-of-text token: set eos_token in its tokenizer_config.json")
    hf.backend_tokenizer.encode_special_tokens = True
    hf.backend_tokenizer.no_truncation()  # some tokenizer.json cut or fill up every text to the length of their first model
    hf.backend_tokenizer.no_padding()
    return Tokenizer(hf, vocab_size=max(hf.get_vocab().values()) + 1, eod=hf.eos_token_id)


@dataclass(frozen=True)
class Vocabulary:
    """Token -> id, and those tokens that were added to the model's own."""

    tokens: Mapping[str, int]
    added: frozenset[str]

    @property
    def fingerprint(self) -> str:
        """Hash of tokens and ids, however the files are laid out."""
        return hashlib.sha256(repr(sorted(self.tokens.items())).encode()).hexdigest()[:16]

    def difference(self, other: Vocabulary) -> tuple[str, int] | None:
        """A token and its id in one that the other gives another meaning; None where both are the same.

        An added token that only one has, with an id that only one has, is no difference: opening and saving a tokenizer may
        add those of tokenizer_config.json.
        """
        if self.tokens == other.tokens:
            return None
        for here, there in ((self, other), (other, self)):
            taken = set(there.tokens.values())
            for token, i in sorted(here.tokens.items() - there.tokens.items(), key=lambda entry: entry[1]):
                if token not in here.added or token in there.tokens or i in taken:
                    return token, i
        return None


def read_vocabulary(directory: Path) -> Vocabulary | None:
    """The vocabulary of a Hugging Face tokenizer directory, read without opening the tokenizer.

    None where it is not in JSON (sentencepiece only). Raises FlextronError naming a damaged file.
    """
    file = next((directory / name for name in ("tokenizer.json", "vocab.json") if (directory / name).is_file()), None)
    if file is None:
        return None
    try:
        table = json.loads(file.read_bytes())
        tokens = table["model"]["vocab"] if file.name == "tokenizer.json" else table
        if isinstance(tokens, list):  # [[token, score], ...]
            tokens = {token: i for i, (token, _) in enumerate(tokens)}
        added = {entry["content"]: entry["id"] for entry in table.get("added_tokens", ())} if table is not tokens else {}
        return Vocabulary({**tokens, **added}, frozenset(added.keys() - tokens.keys()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FlextronError(f"{file}: is not a tokenizer's vocabulary ({type(error).__name__}: {error})") from None


def groups(entries: Iterable[_Entry]) -> Iterator[list[_Entry]]:
    """Entries, the last field of each a text, in groups of about 2 million characters (at least one entry each)."""
    group: list[_Entry] = []
    letters = 0
    for entry in entries:
        group.append(entry)
        letters += len(entry[-1])
        if letters >= _GROUP:
            yield group
            group, letters = [], 0
    if group:
        yield group


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > _PIECE:
        found = _PIECE_END.search(text, start + _PIECE // 2, start + _PIECE)
        end = found.start() if found else start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
