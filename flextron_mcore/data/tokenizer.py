"""Tokenizers for training text and prompts: a trained byte-level BPE, or a Hugging Face tokenizer directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..config import FlextronError
from ..families.code_keys import without_code
from ..files import expanded, explain, read_json
from .long_texts import PIECE, encode_long
from .tokenizer_files import check_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCAB = 257  # one token for each of the 256 bytes, and END_OF_TEXT
BATCH = 1 << 21  # characters of one batch for the Rust backend
_CONFIG = "tokenizer_config.json"
_PIECE_END = re.compile(r"(?<=\S)(?=\s)")  # in front of white space, where a cut splits no word of the BPE's training

_Entry = TypeVar("_Entry", bound=tuple)


@dataclass(frozen=True)
class Tokenizer:
    """Hugging Face tokenizer with a Rust backend, and the special tokens that it adds to texts.

    Attributes:
        hf: tokenizer of transformers.
        vocab_size: largest id + 1.
        eod: id of the token that ends a document: the tokenizer's EOS.
        prefix: ids that the tokenizer puts in front of every text, such as BOS.
        suffix: ids that the tokenizer puts behind every text; empty for most tokenizers.
    """

    hf: PreTrainedTokenizerBase
    vocab_size: int
    eod: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    @property
    def vocabulary(self) -> Vocabulary:
        """All tokens with their ids."""
        return Vocabulary(self.hf.get_vocab(), frozenset(self.hf.get_added_vocab()))

    def state(self) -> str:
        """Hash of all that decides the token ids of a text; 64 hexadecimal digits."""
        backend = self.hf.backend_tokenizer
        parts = (backend.to_str(), backend.encode_special_tokens, self.vocab_size, self.eod, self.prefix, self.suffix)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each document, int64 [tokens]: `prefix`, ids of the text, `suffix`, and `eod` unless it ends `suffix`."""
        end = self.suffix if self.suffix[-1:] == (self.eod,) else (*self.suffix, self.eod)
        return [np.array([*self.prefix, *ids, *end], dtype=np.int64) for ids in self._plain(texts)]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each prompt: `prefix` and the ids of the text, without `suffix` and `eod`.

        A prompt without any token becomes [BOS], or [eod] for a tokenizer without BOS.
        """
        start = self.hf.bos_token_id if self.hf.bos_token_id is not None else self.eod
        return [[*self.prefix, *ids.tolist()] or [start] for ids in self._plain(texts)]

    def _plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, int64 [tokens], without `prefix` and `suffix`."""
        backend = self.hf.backend_tokenizer
        found: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(texts)
        for group in groups((i, text) for i, text in enumerate(texts) if len(text) <= PIECE):
            encoded = backend.encode_batch_fast([text for _, text in group], add_special_tokens=False)
            for (i, _), encoding in zip(group, encoded, strict=True):
                found[i] = np.array(encoding.ids, dtype=np.int64)
        for i, text in enumerate(texts):
            if len(text) > PIECE:
                found[i] = encode_long(backend, text)
        return found

    def continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        """Text that generated `ids` append to the text of a prompt.

        Decodes prompt and ids together, because decoders of some tokenizers drop a space in front of the first token.
        """
        whole = self.decode([*prompt, *ids])
        # The prompt may end within a UTF-8 character, which the ids complete.
        return whole[len(os.path.commonprefix([self.decode(prompt), whole])) :]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of token ids, special tokens included."""
        return self.hf.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face tokenizer directory that transformers 4 and 5 open with the same token ids; no key names code."""
        self.hf.save_pretrained(path)
        config_file = Path(path, _CONFIG)
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config = without_code(config)
        # The first two are arguments of from_pretrained that transformers writes to the file. For the other two, transformers
        # replaces the post-processor in tokenizer.json, which adds BOS and EOS.
        for name in ("is_local", "local_files_only", "add_bos_token", "add_eos_token"):
            config.pop(name, None)
        # This class takes tokenizer.json as it is. Others rebuild the tokenizer from its vocabulary and from keys, some of which
        # transformers 5 does not save: without "legacy", Llama 2's has other ids behind special tokens.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if self.hf.backend_tokenizer.encode_special_tokens or "split_special_tokens" in config:
            config["split_special_tokens"] = bool(self.hf.backend_tokenizer.encode_special_tokens)
        _write_json(config_file, config)
        _write_json(Path(path, "special_tokens_map.json"), {k: str(v) for k, v in self.hf.special_tokens_map.items()})


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE, which encodes every text and decodes it to the same text.

    The vocabulary is smaller than `vocab_size` if the texts have too few different words. Equal texts give equal tokenizers.
    Raises FlextronError if `vocab_size` is below SMALLEST_VOCAB.
    """
    if vocab_size < SMALLEST_VOCAB:
        raise FlextronError(
            f"vocab_size={vocab_size} is too small: a byte-level tokenizer needs at least {SMALLEST_VOCAB} tokens"
        )
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
            tokenizer_object=bpe,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            clean_up_tokenization_spaces=False,
            split_special_tokens=True,  # encodes END_OF_TEXT in a text as ordinary text, which does not end the document
        ),
        "the trained tokenizer",
    )


def open_tokenizer(path: str | Path, add_bos: bool | None = None, parse_special_tokens: bool | None = None) -> Tokenizer:
    """Open a Hugging Face tokenizer directory, without a download and without running code from it.

    Args:
        path: directory with tokenizer.json, or other files from which transformers makes a fast tokenizer.
        add_bos: put the BOS token in front of every text; None: as the tokenizer does.
        parse_special_tokens: encode the text of a special token, such as <|endoftext|>, as this token; False: as ordinary text;
            None: as the tokenizer does.

    Raises:
        FlextronError: the directory does not exist, transformers cannot open it, the tokenizer has no Rust backend or no EOS
            token, or add_bos=True for a tokenizer without BOS token.
    """
    directory = expanded(path)
    if not directory.is_dir():
        raise FlextronError(f"tokenizer={path}: no such directory: name a directory that holds tokenizer.json")
    check_tokenizer_files(directory)
    _check_packages(directory)
    from transformers import AutoTokenizer

    with _transformers_can(f"tokenizer={path}"):
        hf = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    opened = _wrap(hf, f"tokenizer={path}")
    if parse_special_tokens is not None:
        hf.split_special_tokens = not parse_special_tokens
        hf.backend_tokenizer.encode_special_tokens = not parse_special_tokens
    bos = hf.bos_token_id
    if add_bos is None or add_bos == (bos is not None and bos in opened.prefix):
        return opened
    if bos is None:
        raise FlextronError(f"add_bos=true: tokenizer={path} has no BOS token: leave add_bos out, or set bos_token in its config")
    prefix = (bos, *opened.prefix) if add_bos else tuple(i for i in opened.prefix if i != bos)
    from tokenizers.processors import TemplateProcessing

    names = [[hf.convert_ids_to_tokens(i) for i in ids] for ids in (prefix, opened.suffix)]
    hf.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*names[0], "$A", *names[1]],
        pair=[*names[0], "$A", "$B", *names[1]],
        special_tokens=sorted({hf.convert_ids_to_tokens(i): i for i in (*prefix, *opened.suffix)}.items()),
    )
    return replace(opened, prefix=prefix)


def opened_unlike_files(source: Path) -> Tokenizer | None:
    """Tokenizer of a model's directory, if transformers may give it other tokens or ids than `read_vocabulary` finds; else None.

    transformers chooses the tokenizer's class by tokenizer_class and by model_type of config.json, and adds tokens that only
    tokenizer_config.json, special_tokens_map.json or added_tokens.json names. Opening takes seconds: it is left out where the
    files leave no doubt. None as well if transformers cannot open the tokenizer: the first stage that encodes text says why.

    Args:
        source: Hugging Face directory of the model.
    """
    name, family = _value(source / _CONFIG, "tokenizer_class"), _value(source / "config.json", "model_type")
    # These classes take tokenizer.json as it is, except for Qwen2, whose class follows from model_type alone.
    as_stored = name in ("PreTrainedTokenizerFast", "TokenizersBackend") and family != "qwen2"
    if as_stored and (vocabulary := read_vocabulary(source)) and vocabulary.complete:
        return None
    try:
        return open_tokenizer(source)
    except FlextronError:
        return None


def keep_ids(theirs: Tokenizer, copy: Path) -> None:
    """Give a copied tokenizer the token ids that transformers finds in the model's own directory.

    The copy is written anew if it opens as another tokenizer, because config.json is not beside it, as for a Mistral or Phi-3
    with the class LlamaTokenizer, or if its files do not list all tokens.

    Args:
        theirs: tokenizer of the model's directory.
        copy: copy of its files.
    """
    try:
        copied, listed = open_tokenizer(copy), read_vocabulary(copy)
    except FlextronError:
        copied = listed = None
    if copied is None or copied.hf.backend_tokenizer.to_str() != theirs.hf.backend_tokenizer.to_str():
        theirs.save(copy)
    elif listed is None or listed.tokens != theirs.vocabulary.tokens:
        theirs.save(copy)


def _value(file: Path, key: str) -> object:
    """Value of a key of the JSON object in a file; None if there is none."""
    return _entries(file).get(key)


def _entries(file: Path) -> Mapping[str, Any]:
    """JSON object in a file; {} for another JSON value, or no file. Raises FlextronError for damaged JSON."""
    try:
        values = read_json(file) if file.is_file() else None
    except (OSError, ValueError) as error:
        raise FlextronError(f"{file}: is damaged: {explain(error)}: copy it again") from None
    return values if isinstance(values, dict) else {}


def _named_tokens(directory: Path) -> Iterator[tuple[str, int | None]]:
    """(token, its id or None) of the tokens in the files beside tokenizer.json, from which transformers adds those it lacks."""
    for name in (_CONFIG, "special_tokens_map.json"):
        for key, value in _entries(directory / name).items():
            if key == "added_tokens_decoder" and isinstance(value, dict):
                yield from ((_content(entry), int(i)) for i, entry in value.items() if str(i).isdigit())
            elif key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
                entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
                yield from ((_content(entry), None) for entry in entries)
            elif key.endswith("_token"):
                yield _content(value), None
    yield from _entries(directory / "added_tokens.json").items()


def _content(entry: object) -> str:
    """Text of a token that is written as text or as {"content": text, ...}; "" for any other value, such as true."""
    entry = entry.get("content") if isinstance(entry, dict) else entry
    return entry if isinstance(entry, str) else ""


def _check_packages(directory: Path) -> None:
    """Raise FlextronError if the package that tokenizer.model needs is missing; transformers would name another package."""
    file = directory / "tokenizer.model"
    if (directory / "tokenizer.json").is_file() or not file.is_file():
        return
    with file.open("rb") as stream:
        text = stream.readline(200)
    # A line of a tiktoken file is a token in base64 and its rank; a sentencepiece file is binary.
    package = "tiktoken" if re.fullmatch(rb"[A-Za-z0-9+/=]+ \d+\s*", text) else "sentencepiece"
    if find_spec(package) is None:
        raise FlextronError(
            f"tokenizer={directory}: tokenizer.model needs the package {package}, which is not installed: pip install {package}"
        )


@contextlib.contextmanager
def _transformers_can(name: str) -> Iterator[None]:
    """Turn any error of transformers, tokenizers or json within the block into a FlextronError. name: start of the message."""
    try:
        yield
    except Exception as error:
        python = isinstance(error, LookupError | TypeError | AttributeError)  # their texts speak of Python's types
        reason = explain(error) if python else " ".join(str(error).split())[:200]
        raise FlextronError(f"{name}: not a tokenizer that transformers can open: {reason}") from error


def _wrap(hf: PreTrainedTokenizerBase, name: str) -> Tokenizer:
    """Tokenizer record of a transformers tokenizer, with prefix and suffix read off an encoded letter.

    Switches off its truncation and padding. Raises FlextronError without a Rust backend or an EOS token, and for a post-processor
    that changes tokens of the text. name: start of the message.
    """
    if not hf.is_fast:
        raise FlextronError(
            f"{name}: has no Rust backend, which encoding a corpus needs: convert it to a fast tokenizer (tokenizer.json) with "
            "transformers"
        )
    if hf.eos_token_id is None:
        raise FlextronError(f"{name}: has no end-of-text token: set eos_token in its tokenizer_config.json")
    backend = hf.backend_tokenizer
    backend.no_truncation()  # some tokenizer.json files truncate or pad every text to a model's context length
    backend.no_padding()
    with _transformers_can(name):
        whole = tuple(hf("a").input_ids)
    plain = tuple(backend.encode("a", add_special_tokens=False).ids)
    backend.encode_special_tokens = bool(getattr(hf, "split_special_tokens", False))
    for start in range(len(whole) - len(plain) + 1):
        end = start + len(plain)
        if whole[start:end] == plain:
            size = max(hf.get_vocab().values()) + 1
            return Tokenizer(hf, size, hf.eos_token_id, whole[:start], whole[end:])
    raise FlextronError(
        f"{name}: its post-processor changes tokens of the text: only post-processors that add tokens at both ends are supported"
    )


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary of a tokenizer directory, for comparison with the vocabulary of another directory.

    Attributes:
        tokens: {token: id}, added tokens included.
        added: tokens that only added_tokens of tokenizer.json lists, not the vocabulary of the tokenizer's model.
        complete: False if transformers may find other tokens or ids, because files beside tokenizer.json name more tokens, or
            added_tokens has ids that it does not keep.
    """

    tokens: Mapping[str, int]
    added: frozenset[str]
    complete: bool = True

    @property
    def fingerprint(self) -> str:
        """Hash of tokens and ids, independent of the layout of the files; 16 hexadecimal digits."""
        return hashlib.sha256(repr(sorted(self.tokens.items())).encode()).hexdigest()[:16]

    def beyond(self, vocab_size: int) -> tuple[str, int] | None:
        """(token, id) with the lowest id of at least `vocab_size`, the rows of an embedding; None if all ids are smaller."""
        missing = [(i, token) for token, i in self.tokens.items() if i >= vocab_size]
        return min(missing)[::-1] if missing else None

    def difference(self, other: Vocabulary) -> tuple[str, int] | None:
        """(token, id) that only one of two vocabularies contains; None if they are compatible.

        Ignores an added token that the other vocabulary lacks, if the other vocabulary does not use the id either: opening and
        saving a tokenizer may add the tokens of tokenizer_config.json.
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
    """Vocabulary of a Hugging Face tokenizer directory, read from its JSON without opening the tokenizer.

    Returns None if the directory has no vocabulary in JSON (sentencepiece only). Raises FlextronError naming a damaged file.
    """
    file = next((directory / name for name in ("tokenizer.json", "vocab.json") if (directory / name).is_file()), None)
    if file is None:
        return None
    try:
        table = read_json(file)
        tokens = table["model"]["vocab"] if file.name == "tokenizer.json" else table
        if isinstance(tokens, list):  # [[token, score], ...]
            tokens = {token: i for i, (token, _) in enumerate(tokens)}
        added = {entry["content"]: entry["id"] for entry in table.get("added_tokens", ())} if table is not tokens else {}
        found = {**tokens, **added}
        if not all(isinstance(i, int) for i in found.values()):
            raise TypeError("an id is no whole number")
        named = ((token, i) for token, i in _named_tokens(directory) if token)
        complete = all(token in found and i in (None, found[token]) for token, i in named) and _kept(tokens, added)
        return Vocabulary(found, frozenset(added.keys() - tokens.keys()), complete)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FlextronError(
            f"{file}: is not a tokenizer's vocabulary ({explain(error)}): copy the tokenizer's files again"
        ) from None


def _kept(tokens: Mapping[str, int], added: Mapping[str, int]) -> bool:
    """True if the library `tokenizers` keeps the ids of added_tokens.

    A token of the model keeps its id there; the others get ids behind the last one, or behind the number of the model's tokens.

    Args:
        tokens: {token: id} of the tokenizer's model.
        added: {token: id} of added_tokens, in their order.
    """
    last = -1
    for token, i in added.items():
        if i != tokens.get(token, max(last + 1, len(tokens))):
            return False
        last = max(last, i)
    return True


def groups(entries: Iterable[_Entry]) -> Iterator[list[_Entry]]:
    """Batches of entries: lists with about 2 million characters of text, at least one entry each.

    entries: tuples whose last item is a text.
    """
    group: list[_Entry] = []
    letters = 0
    for entry in entries:
        group.append(entry)
        letters += len(entry[-1])
        if letters >= BATCH:
            yield group
            group, letters = [], 0
    if group:
        yield group


def _pieces(text: str) -> Iterator[str]:
    """Pieces of a text, each at most PIECE characters, cut in front of white space where possible."""
    start = 0
    while len(text) - start > PIECE:
        found = _PIECE_END.search(text, start + PIECE // 2, start + PIECE)
        end = found.start() if found else start + PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
