"""Hugging Face tokenizer as `tokenizer.ggml.*` keys of a GGUF file, if llama.cpp splits text in the same way.

llama.cpp has two kinds of tokenizer that Llama models use. `gpt2` is byte-level BPE by rank of merges, with a named
pre-tokenizer. `llama` is sentencepiece's BPE by score of pieces, where unknown characters become bytes.

Source: llama.cpp, src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from flextron_mcore.config import FlextronError
from flextron_mcore.files import explain, read_bytes, read_json, read_text

_SPACE = "▁"  # a space in sentencepiece
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# {result of `_pre_tokenizer`: (llama.cpp's name, its ignore_merges)}
_PRE_TOKENIZERS = {
    "words": ("gpt-2", False),
    "digits, words": ("smollm", False),
    f"split {_LLAMA3}, bytes": ("llama-bpe", True),
    f"split {_QWEN2}, bytes": ("qwen2", False),
}


@dataclass(frozen=True)
class Vocabulary:
    """Tokenizer in llama.cpp's terms, the keys `tokenizer.ggml.*` of a GGUF file.

    Attributes:
        model: kind of the tokenizer, gpt2 (byte-level BPE) or llama (sentencepiece's BPE).
        tokens: text of each token, by id.
        types: type of each token (gguf.TokenType), by id.
        ids: {bos, eos, unk, pad: id}, without those that the tokenizer lacks.
        add_bos, add_eos, add_space_prefix: True if llama.cpp is to add this token, or a space, to a text.
        chat_template: chat template, or a list of {name, template}; None without.
        pre: name of the pre-tokenizer; None without.
        scores: score of each token, by id; None if merges have ranks instead.
        merges: merges as `left right`, best first; None if tokens have scores instead.
    """

    model: str
    tokens: Sequence[str]
    types: Sequence[int]
    ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: Any
    pre: str | None = None
    scores: Sequence[float] | None = None
    merges: Sequence[str] | None = None

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys of the tokenizer to a GGUF file."""
        writer.add_tokenizer_model(self.model)
        if self.pre:
            writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        for name, number in self.ids.items():
            writer.add_uint32(
                f"tokenizer.ggml.{'unknown' if name == 'unk' else 'padding' if name == 'pad' else name}_token_id", number
            )
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read(folder: Path, vocab_size: int) -> Vocabulary:
    """Tokenizer of a Hugging Face directory, for a model of `vocab_size` tokens. Ids without a token are marked unused.

    Raises FlextronError if llama.cpp would split text differently, and for a damaged or missing file.
    """
    file = next((folder / name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()), None)
    if file is None:
        raise FlextronError(
            f"tokenizer={folder}: no tokenizer in it that GGUF can hold: name a directory with tokenizer.json or tokenizer.model"
        )
    try:
        config = _json(folder / "tokenizer_config.json")
        config["chat_template"] = _chat_templates(folder, config)
        if file.name == "tokenizer.model":
            return _from_sentencepiece(file, config, vocab_size)
        return _from_tokenizer_json(_json(file), config, vocab_size)
    except _Unlike as error:
        raise FlextronError(f"tokenizer={folder}: llama.cpp cannot do what this tokenizer does: {error}: use format=hf") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise FlextronError(f"{file}: is not a tokenizer ({explain(error)}): copy it again") from None


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> Any:
    """Chat template of a tokenizer, a list of {name, template} if it has several, None without.

    transformers 4 keeps them in tokenizer_config.json, transformers 5 in files.
    """
    found = config.get("chat_template")
    if isinstance(found, dict):
        found = [{"name": name, "template": text} for name, text in found.items()]
    if (folder / "chat_template.jinja").is_file():
        found = read_text(folder / "chat_template.jinja")
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if more:
        others = [{"name": file.stem, "template": read_text(file)} for file in more]
        found = [*([{"name": "default", "template": found}] if isinstance(found, str) else found or []), *others]
    return found or None


class _Unlike(Exception):
    """Error: a property of a tokenizer that llama.cpp cannot reproduce."""


def _json(file: Path) -> dict[str, Any]:
    """JSON object in a file; {} if there is no such file."""
    return read_json(file) if file.is_file() else {}


def _from_tokenizer_json(values: dict[str, Any], config: dict[str, Any], vocab_size: int) -> Vocabulary:
    """Vocabulary of a tokenizer.json. Raises _Unlike for a property that llama.cpp cannot reproduce.

    Args:
        values: content of tokenizer.json.
        config: content of tokenizer_config.json.
        vocab_size: number of ids, the rows of the model's embedding.
    """
    model, added = values["model"], values.get("added_tokens") or []
    if model["type"] != "BPE":
        raise _Unlike(f"its model is {model['type']}, not BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _Unlike(f"{key}={model[key]!r}")
    for entry in added:
        if odd := [key for key in ("single_word", "lstrip", "rstrip") if entry.get(key)]:
            raise _Unlike(f"its token {entry['content']!r} has {odd[0]}")
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    vocab = {**model["vocab"], **{entry["content"]: entry["id"] for entry in added}}
    special = {entry["content"]: bool(entry["special"]) for entry in added}
    tokens, types = _tokens(vocab, special, vocab_size)
    sentencepiece = bool(model.get("byte_fallback"))
    if sentencepiece:
        pre, prefix = None, _space_prefix(values)
        scores = _scores(tokens, model["vocab"], merges, special)
        _mark_bytes(tokens, types, model.get("unk_token"))
    else:
        scores, prefix = None, False
        shortened = _pre_tokenizer(values.get("pre_tokenizer"))
        if shortened not in _PRE_TOKENIZERS:
            raise _Unlike(f"its pre-tokenizer ({shortened[:60]}) is not GPT-2's, Llama 3's, Qwen's or SmolLM's")
        pre, ignore_merges = _PRE_TOKENIZERS[shortened]
        changes = (values.get("normalizer") or {}).get("type")
        # llama.cpp takes text as it is, also for Qwen, whose texts are in NFC but for rare ones (docs/gguf.md).
        if changes is not None and (pre, changes) != ("qwen2", "NFC"):
            raise _Unlike(f"it changes text before splitting it (normalizer {changes})")
        if bool(model.get("ignore_merges")) != ignore_merges:
            raise _Unlike(f"ignore_merges={not ignore_merges} with the pre-tokenizer {pre}")
    before, after = _template(values.get("post_processor"))
    ids = _special_ids(config, vocab, model.get("unk_token"))
    if before is not None:
        ids["bos"] = vocab[before]
    if after is not None and vocab[after] != ids["eos"]:
        raise _Unlike(f"it ends a text with {after!r}, which is not its end-of-text token")
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        # llama.cpp needs at least one merge; this one matches no text, because no byte becomes its characters
        merges=None if sentencepiece else [" ".join(merge) for merge in merges or [(_SPACE, _SPACE)]],
        ids=ids,
        add_bos=before is not None,
        add_eos=after is not None,
        add_space_prefix=prefix,
        chat_template=config.get("chat_template"),
    )


def _tokens(vocab: Mapping[str, int], special: Mapping[str, bool], size: int) -> tuple[list[str], list[int]]:
    """(texts, types) of tokens by id. Raises _Unlike for two tokens with one id, and for an id of at least `size`.

    Args:
        vocab: {token: id}.
        special: {added token: True for a control token, False for one that users defined}.
        size: number of ids; an id without a token is marked unused.
    """
    token, last = max(vocab.items(), key=lambda entry: entry[1])
    if last >= size:
        raise _Unlike(f"the model has {size} rows, none for its token {token[:40]!r} with id {last}")
    if len(set(vocab.values())) < len(vocab):
        raise _Unlike("two of its tokens have the same id")
    tokens: list[str | None] = [None] * size
    types = [int(TokenType.UNUSED)] * size
    for token, number in vocab.items():
        tokens[number] = token
        types[number] = int(TokenType.NORMAL if token not in special else
                            TokenType.CONTROL if special[token] else TokenType.USER_DEFINED)  # fmt: skip
    names = (name for i in range(2 * size) if (name := f"[PAD{i}]") not in vocab)  # llama.cpp needs a different text for each id
    return [next(names) if token is None else token for token in tokens], types


def _mark_bytes(tokens: Sequence[str], types: list[int], unknown: str | None) -> None:
    """Set the types of byte tokens and of the unknown token, which only sentencepiece has. Raises _Unlike for a missing byte.

    Args:
        tokens: text of each token, by id.
        types: type of each token, by id.
        unknown: text of the unknown token; None without.
    """
    number = {token: i for i, token in enumerate(tokens)}
    for byte in range(256):
        if (token := f"<0x{byte:02X}>") not in number:
            raise _Unlike(f"it lacks the byte {token}")
        types[number[token]] = int(TokenType.BYTE)
    if unknown in number:
        types[number[unknown]] = int(TokenType.UNKNOWN)


def _scores(
    tokens: Sequence[str], vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], special: Mapping[str, bool]
) -> list[float]:
    """Scores by id: minus the rank of the merges that make the token. sentencepiece merges the neighbours with the best score.

    Scores give the same result as merges only if all merges into one token have adjacent ranks, and if every pair of pieces that
    spells a token is a merge; else this raises _Unlike. Runs of one character may share a rank, as Llama 2's spaces do
    (docs/gguf.md).

    Args:
        tokens: text of each token, by id.
        vocab: {token: id}, without added tokens.
        merges: pairs of pieces, best first.
        special: {added token: True for a control token}.
    """
    spans: dict[str, list[int]] = {}  # {token: [first, last] merge into it}, in the order of the first
    for number, (left, right) in enumerate(merges):
        spans.setdefault(left + right, [number, number])[1] = number
    rank: dict[str, int] = {}
    before, end = "", -1
    for place, (token, (first, last)) in enumerate(spans.items()):
        if first < end and len({*before, *token}) > 1:
            raise _Unlike(f"its merges into {before!r} and into {token!r} take turns")
        rank[token] = rank[before] if first < end else place
        before, end = token, max(end, last)
    known = set(merges)
    for token in vocab.keys() - special.keys():
        for left, right in ((token[:i], token[i:]) for i in range(1, len(token))):
            if (len(left) == 1 or left in vocab) and (len(right) == 1 or right in vocab) and (left, right) not in known:
                raise _Unlike(f"it does not merge {left!r} and {right!r} into {token!r}")
    return [-float(rank.get(token, 0)) for token in tokens]


def _space_prefix(values: dict[str, Any]) -> bool:
    """True if the tokenizer puts a space before a text. Raises _Unlike if it does not write spaces as sentencepiece does."""
    normalizer, pre = values.get("normalizer"), values.get("pre_tokenizer")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    if pre is None and steps in ([{"type": "Prepend", "prepend": _SPACE}, replace], [replace]):
        return len(steps) == 2
    if normalizer is None and pre and pre["type"] == "Metaspace" and pre["replacement"] == _SPACE and pre.get("split") is False:
        # "first" adds no space to a text that begins with one; llama.cpp and sentencepiece do (docs/gguf.md).
        return pre["prepend_scheme"] != "never"
    raise _Unlike("it does not write spaces as sentencepiece's Llama does (normalizer and pre_tokenizer of tokenizer.json)")


def _pre_tokenizer(value: dict[str, Any] | None) -> str:
    """Short description of a pre_tokenizer of tokenizer.json, equal for equal behaviour."""
    if value is None:
        return "none"
    kind = value["type"]
    if kind == "Sequence":
        return ", ".join(_pre_tokenizer(step) for step in value["pretokenizers"])
    if kind == "ByteLevel" and not value["add_prefix_space"]:
        return "words" if value.get("use_regex", True) else "bytes"
    if kind == "Digits" and value["individual_digits"]:
        return "digits"
    if kind == "Split" and value["behavior"] == "Isolated" and not value["invert"] and "Regex" in value["pattern"]:
        return f"split {value['pattern']['Regex']}"
    return kind


def _template(value: dict[str, Any] | None) -> tuple[str | None, str | None]:
    """Texts of the tokens that a post_processor of tokenizer.json puts before and after a single text; None for no token.

    ByteLevel puts none, TemplateProcessing those of its template, and a Sequence those of its first part that puts any. Raises
    _Unlike for other kinds of post-processors, and for several tokens at one end.
    """
    if value is None or value["type"] == "ByteLevel":
        return None, None
    if value["type"] == "Sequence":
        found = [_template(step) for step in value["processors"]]
        return next((pair for pair in found if pair != (None, None)), (None, None))
    if value["type"] != "TemplateProcessing":
        raise _Unlike(f"its post-processor is {value['type']}")
    pieces = [piece.get("SpecialToken", {}).get("id") for piece in value["single"]]  # None for the text
    text = pieces.index(None)
    before, after = pieces[:text], pieces[text + 1 :]
    if len(before) > 1 or len(after) > 1:
        raise _Unlike("it puts more than one token before or after a text")
    return (before or [None])[0], (after or [None])[0]


def _special_ids(config: dict[str, Any], vocab: Mapping[str, int], unknown: str | None) -> dict[str, int]:
    """Ids of the special tokens in tokenizer_config.json, {bos, eos, unk, pad: id}; a token that it lacks is left out.

    A missing bos gets the id of eos, because llama.cpp would use a default of its own. Raises _Unlike without eos.

    Args:
        config: content of tokenizer_config.json.
        vocab: {token: id}.
        unknown: token that is unk if tokenizer_config.json names none; None without.
    """
    ids = {}
    for name in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{name}_token") or (unknown if name == "unk" else None)
        token = token["content"] if isinstance(token, dict) else token
        if token in vocab:
            ids[name] = vocab[token]
    if "eos" not in ids:
        raise _Unlike("it has no end-of-text token (eos_token of tokenizer_config.json), and llama.cpp would use its default")
    return {"bos": ids["eos"], **ids}


def _from_sentencepiece(file: Path, config: dict[str, Any], vocab_size: int) -> Vocabulary:
    """Vocabulary of a tokenizer.model of sentencepiece.

    Raises _Unlike for a property that llama.cpp cannot reproduce, and ValueError for a damaged file.

    Args:
        file: path of tokenizer.model.
        config: content of tokenizer_config.json.
        vocab_size: number of ids, the rows of the model's embedding.
    """
    from transformers.convert_slow_tokenizer import import_protobuf  # late: slow to import

    try:
        proto = import_protobuf().ModelProto.FromString(read_bytes(file))
    except Exception as error:  # of a class of protobuf
        raise ValueError(error) from None
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != 2:
        raise _Unlike("its sentencepiece model is not BPE")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise _Unlike("it changes text before splitting it (its sentencepiece normalizer)")
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    tokens, types = _tokens(vocab, {}, vocab_size)
    scores = [0.0] * vocab_size
    for i, piece in enumerate(proto.pieces):
        types[i], scores[i] = piece.type, piece.score  # sentencepiece and GGUF have the same numbers of types
    if types.count(TokenType.BYTE) != 256:
        raise _Unlike("it has no bytes for unknown characters")
    named = {f"{name}_token": getattr(trainer, f"{name}_piece") for name in ("bos", "eos", "unk")}
    return Vocabulary(
        model="llama",
        tokens=tokens,
        types=types,
        scores=scores,
        ids=_special_ids({**named, **config}, vocab, None),
        add_bos=bool(config.get("add_bos_token", True)),
        add_eos=bool(config.get("add_eos_token", False)),
        add_space_prefix=normalizer.add_dummy_prefix,
        chat_template=config.get("chat_template"),
    )
