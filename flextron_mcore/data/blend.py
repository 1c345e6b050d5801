"""Datasets of prepared data: a weighted blend of the domains for training, one epoch of each domain for validation.

Datasets have no reading position: the samples of step n are `batch(dataset, range(n * size, (n + 1) * size))`. `train_dataset`
and `valid_datasets` need an initialized torch.distributed (one process is enough) and are called on all ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shlex
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config import FlextronError, nearest
from ..digests import DATA_FILE, check_files, write_digests
from ..files import check_file, child, explain, open_file, parse_json, read_bytes
from ..runtime.disk import write_aside
from ..runtime.ranks import on_main_process, wait_for_all
from .prepare import DATA_VERSION
from .tokenizer import read_vocabulary
from .tokenizer_files import check_tokenizer_files

if TYPE_CHECKING:
    from torch.utils.data import Dataset

_PARTS, _SEEN = 16, 1 << 16  # a token file's digest covers about _PARTS parts of _SEEN bytes, evenly spread
_AGAIN = "run `flextron prepare` again"
SAMPLE_KEYS = ("tokens", "labels", "loss_mask", "position_ids")  # fields of a sample and of a batch


@dataclass(frozen=True)
class Domain:
    """Token files and sizes of one domain of a directory that `flextron prepare` wrote.

    Attributes:
        train: path of the training tokens, without .bin and .idx.
        valid: path of the validation tokens, without .bin and .idx.
        train_tokens: number of training tokens.
        valid_tokens: number of validation tokens.
        documents: number of documents of both splits; a document that is cut between the splits counts once.
        bytes: UTF-8 bytes of the text of all documents.
    """

    train: str
    valid: str
    train_tokens: int
    valid_tokens: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class PreparedData:
    """Description of a directory that `flextron prepare` wrote, as `open_data` reads it from data.json.

    Attributes:
        path: the directory.
        tokenizer: directory of the Hugging Face tokenizer.
        vocab_size: largest token id + 1.
        eod: id of the token that ends a document.
        domains: {name: domain}.
        fingerprint: hash of data.json, of all document lengths and of 1 MiB of each token file; equal for a copy of the
            directory at another path.
        own_tokens: True if `prepare` was given add_bos or parse_special_tokens, which replace the original tokenizer's handling
            of BOS and of special tokens. The saved tokenizer applies both settings.
    """

    path: Path
    tokenizer: Path
    vocab_size: int
    eod: int
    domains: dict[str, Domain]
    fingerprint: str
    own_tokens: bool = False


def open_data(path: str | Path) -> PreparedData:
    """Description of a prepared directory, after a check that its token files and its tokenizer are complete.

    Raises FlextronError naming the file that is missing, damaged or truncated.
    """
    root = Path(path).expanduser()
    file = root / DATA_FILE
    try:
        text = read_bytes(file)
        table = parse_json(text)
    except OSError as error:
        raise FlextronError(
            f"{file}: cannot be read ({error.strerror}): set data= to a directory that `flextron prepare` wrote"
        ) from None
    except ValueError as error:
        raise FlextronError(f"{file}: is not valid JSON ({error}): {_AGAIN}") from None
    if not isinstance(table, dict) or table.get("version") != DATA_VERSION:
        raise FlextronError(f"{file}: is not prepared data of version {DATA_VERSION}: {_AGAIN}")
    check_files(root, DATA_FILE, "tokenizer")
    digest = hashlib.sha256(text)
    try:
        domains = {}
        for name, entry in table["domains"].items():
            check_files(root, *(f"{entry[split]}.idx" for split in ("train", "valid")))
            for split in ("train", "valid"):
                digest.update(_check_tokens(child(root, entry[split], file), entry[f"{split}_tokens"]))
            domains[name] = Domain(**{**entry, "train": str(root / entry["train"]), "valid": str(root / entry["valid"])})
        tokenizer = child(root, table["tokenizer"], file)
        own = any(table.get(key) is not None for key in ("add_bos", "parse_special_tokens"))
        if not tokenizer.is_dir():
            raise FlextronError(f"{tokenizer}: no such directory, but {DATA_FILE} names it as the tokenizer: {_AGAIN}")
        check_tokenizer_files(tokenizer)
        data = PreparedData(root, tokenizer, table["vocab_size"], table["eod"], domains, digest.hexdigest()[:16], own)
    except (KeyError, TypeError, AttributeError) as error:
        raise FlextronError(f"{file}: an entry is missing or invalid ({explain(error)}): {_AGAIN}") from None
    if not data.domains:
        raise FlextronError(f"{file}: lists no domain: {_AGAIN}")
    return data


def train_dataset(
    data: PreparedData,
    seq_length: int,
    num_samples: int,
    seed: int,
    cache_dir: str | Path,
    weights: Mapping[str, float] | None = None,
) -> Dataset:
    """Weighted blend of the training tokens of the domains. A domain with too few tokens is repeated. Call on all ranks.

    Args:
        data: prepared data.
        seq_length: tokens of a sample.
        num_samples: minimum number of samples of the dataset.
        seed: seed of the order of samples.
        cache_dir: directory for Megatron's sample indices.
        weights: {domain: weight}; a domain's share of the samples is its weight divided by the sum of weights. A domain that is
            left out or has weight 0 is not used. None: equal shares for all domains.

    Returns:
        Dataset of samples {tokens, labels, position_ids: int64 [seq_length]; loss_mask: float32 [seq_length]}.

    Raises:
        FlextronError: an unknown domain, a weight that is not a number of at least 0, or no weight above 0.
    """
    chosen = check_weights(data, weights)
    total = sum(chosen.values())
    blend = ([data.domains[name].train for name in chosen], [weight / total for weight in chosen.values()])
    # Megatron rounds each domain's samples up, so its blend may take len(chosen) - 2 samples more of a domain than its share.
    surplus = 0.005 + len(chosen) / max(1.0, num_samples * min(blend[1]))
    return _build(data, seq_length, seed, cache_dir, [blend, None, None], [num_samples, 0, 0], surplus)


def valid_datasets(data: PreparedData, seq_length: int, seed: int, cache_dir: str | Path) -> dict[str, Dataset]:
    """{domain: dataset of one epoch of the domain's validation tokens}. Call on all ranks.

    Samples are {tokens, labels, position_ids: int64 [seq_length]; loss_mask: float32 [seq_length]}, as in `train_dataset`.

    Every token but the first is a label exactly once. The last sample is padded with token 0, and its loss_mask is 0 there.

    Args:
        data: prepared data.
        seq_length: tokens of a sample.
        seed: seed of Megatron's datasets; a cache is reused for the same seed only.
        cache_dir: directory for Megatron's sample indices.
    """
    found = {}
    for name, domain in data.domains.items():
        dataset = _build(data, seq_length, seed, cache_dir, [None, ([domain.valid], None), None], [0, None, 0], 0.0)
        # GPTDataset caches the loss mask of the first sample that it returns, and would give the mask of a padded last sample to
        # all others.
        dataset.masks_and_position_ids_are_cacheable = False
        found[name] = dataset
    return found


def batch(dataset: Dataset, indices: Iterable[int]) -> dict[str, torch.Tensor]:
    """Batch of samples: tokens, labels, position_ids (int64) and loss_mask (float32), each [len(indices), seq_length].

    An index is taken modulo the length of the dataset.
    """
    samples = [dataset[i % len(dataset)] for i in indices]
    return {key: torch.stack([sample[key] for sample in samples]) for key in SAMPLE_KEYS}


@dataclass(frozen=True)
class _TokenizerFacts:
    """Stand-in for a tokenizer, which has only the attributes that Megatron's datasets read, and no encoder or decoder.

    Attributes:
        vocab_size: largest token id + 1.
        eod: id of the token that ends a document.
        fingerprint: hash of the prepared data.
        pad: id that fills up the last sample. No token has the id -1, so that Megatron masks only padding out of the loss.
    """

    vocab_size: int
    eod: int
    fingerprint: str
    pad: int = -1

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """Values that Megatron adds to the key of cached sample indices. Data prepared again has another fingerprint."""
        return {"vocab_size": self.vocab_size, "eod": self.eod, "data": self.fingerprint}


def _build(
    data: PreparedData, seq_length: int, seed: int, cache_dir: str | Path, blends: list, sizes: list, surplus: float
) -> Dataset:
    """Dataset of one split (training or validation), from cached sample indices if they are complete. Call on all ranks.

    Args:
        data: prepared data.
        seq_length: tokens of a sample.
        seed: seed of the order of samples.
        cache_dir: directory of the caches, one for each set of arguments.
        blends: blend_per_split of Megatron's GPTDatasetConfig: (path prefixes, weights) of the split; None for the other splits.
        sizes: minimum number of samples of each split: None for one epoch, 0 for the other splits.
        surplus: mid_level_dataset_surplus of GPTDatasetConfig, the share of samples built beyond a domain's share.
    """
    asked = [
        data.fingerprint,
        seq_length,
        seed,
        [blend and (list(map(str, blend[0])), blend[1]) for blend in blends],
        sizes,
        surplus,
    ]
    cache = Path(cache_dir) / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    if on_main_process(lambda: _is_whole(cache)):
        return _indexed(data, seq_length, seed, cache, blends, sizes, surplus)
    # Megatron-Core does not check index files that exist, so a killed process must not leave incomplete ones under these names.
    with contextlib.ExitStack() as main_process:
        aside = on_main_process(lambda: main_process.enter_context(write_aside(cache)))
        built = _indexed(data, seq_length, seed, aside, blends, sizes, surplus)
        wait_for_all()
        on_main_process(lambda: write_digests(aside))
    wait_for_all()
    return built


def _is_whole(cache: Path) -> bool:
    """True if a directory of Megatron-Core's index files exists and its files match their recorded digests."""
    try:
        for file in cache.glob("*.npy"):  # Megatron-Core reads them with allow_pickle
            check_file(file)
            np.load(file, mmap_mode="r", allow_pickle=False)
        return check_files(cache)
    except (OSError, ValueError, EOFError, FlextronError):
        return False


def _indexed(data: PreparedData, seq_length: int, seed: int, cache: Path, blends: list, sizes: list, surplus: float) -> Dataset:
    """Dataset whose sample indices are read from the directory `cache`, or computed and written to it."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    with _quiet():
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            blend_per_split=blends,
            path_to_cache=str(cache),
            tokenizer=_TokenizerFacts(data.vocab_size, data.eod, data.fingerprint),
            mid_level_dataset_surplus=surplus,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            drop_last_partial_validation_sequence=False,
        )
        try:
            built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
        except Exception as error:
            if isinstance(error.__cause__, OSError):  # Megatron-Core wraps an OSError in a long message about shared storage
                raise error.__cause__ from None
            raise
    return next(dataset for dataset in built if dataset is not None)


def check_weights(data: PreparedData, weights: Mapping[str, float] | None) -> dict[str, float]:
    """{domain: weight} of the domains with a weight above 0. weights=None gives every domain the weight 1.

    Raises FlextronError, which names the key data_weights, for an unknown domain, for a weight that is not a finite number of at
    least 0, and if no weight is above 0.
    """
    if weights is None:
        return dict.fromkeys(data.domains, 1.0)
    for name, weight in weights.items():
        if name not in data.domains:
            raise FlextronError(
                f"data_weights: no domain '{name}' in {data.path}{nearest(name, data.domains)}: it has {', '.join(data.domains)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise FlextronError(f"data_weights.{name}={weight!r} must be a number of at least 0")
    chosen = {name: float(weights[name]) for name in data.domains if weights.get(name)}
    if not chosen:
        raise FlextronError(f"data_weights: no domain has a weight above 0: give one to {' or '.join(data.domains)}")
    return chosen


def check_tokenizer(data: PreparedData, tokenizer: Path | None) -> None:
    """Raise FlextronError if the data's vocabulary differs from the vocabulary in `tokenizer`, a model's tokenizer directory.

    Compares nothing if `tokenizer` is None or if either directory has no vocabulary in JSON.
    """
    ours, models = read_vocabulary(data.tokenizer), read_vocabulary(tokenizer) if tokenizer else None
    if ours and models and (different := ours.difference(models)):
        token, i = different
        key = shlex.quote(f"tokenizer={tokenizer}")
        raise FlextronError(
            f"data={data.path}: prepared with another tokenizer than the model's, {tokenizer}: only one of the two has the token "
            f"{i} {token[:40]!r}: prepare the data with the model's tokenizer, `flextron prepare {key} ...`"
        )


def _check_tokens(prefix: Path, tokens: int) -> bytes:
    """Check that a .idx and a .bin file fit together and hold `tokens` tokens; return the SHA-256 of .idx and parts of .bin.

    Raises FlextronError naming the file that is missing or truncated.
    """
    from megatron.core.datasets.indexed_dataset import DType

    index, binary = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
    try:
        with open_file(index) as stream:
            # header, version, dtype code, sequences, documents (+1); then lengths, pointers, document boundaries
            head = stream.read(34)
            magic, version, code, sequences, documents = struct.unpack("<9sQBQQ", head.ljust(34, b"\0"))
            size = 34 + 12 * sequences + 8 * documents
            if magic != b"MMIDIDX\0\0" or version != 1 or index.stat().st_size != size:
                raise FlextronError(f"{index}: is truncated or not a Megatron index: {_AGAIN}")
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256")
        held = binary.stat().st_size
        with open_file(binary) as stream:
            for start in (*range(0, held, max(_SEEN, held // _PARTS)), max(0, held - _SEEN)):
                stream.seek(start)
                digest.update(stream.read(_SEEN))
    except OSError as error:
        raise FlextronError(f"{error.filename}: cannot be read ({error.strerror}): {_AGAIN}") from None
    if held != tokens * DType.size(code):
        raise FlextronError(
            f"{binary}: is truncated or belongs to other data: it has {held} bytes, not {tokens} tokens of {DType.size(code)} "
            f"bytes: {_AGAIN}"
        )
    return digest.digest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Megatron's dataset loggers, which print a dozen INFO lines a dataset, within the block."""
    logger = logging.getLogger("megatron.core.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
