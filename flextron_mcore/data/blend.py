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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..config import FlextronError, nearest
from ..digests import DATA_FILE, check_files, write_digests
from ..files import check_file, child, expanded, explain, parse_json, read_bytes
from ..runtime.disk import write_aside
from ..runtime.ranks import on_main_process, wait_for_all
from .existing import DATA_VERSION
from .index import digest_of, read_index
from .tokenizer import read_vocabulary
from .tokenizer_files import check_tokenizer_files

if TYPE_CHECKING:
    from torch.utils.data import Dataset

_AGAIN = "run `flextron prepare` again"
SAMPLE_KEYS = ("tokens", "labels", "loss_mask", "position_ids")  # fields of a sample and of a batch


@dataclass(frozen=True)
class Domain:
    """Token files and sizes of one domain of a directory that `flextron prepare` wrote.

    Attributes:
        train: path of the training tokens, without .bin and .idx; None without training tokens.
        valid: path of the validation tokens, without .bin and .idx; None without validation tokens.
        train_tokens: number of training tokens.
        valid_tokens: number of validation tokens.
        documents: number of documents of both splits; a document that is cut between the splits counts once.
        bytes: UTF-8 bytes of the text of all documents; None for an existing corpus, whose text is not known.
        weight: weight in a blend for which data_weights gives none.
        digest: hexadecimal digest of an existing corpus outside of the directory (index.py); None for files within it.
    """

    train: str | None
    valid: str | None
    train_tokens: int
    valid_tokens: int
    documents: int
    bytes: int | None
    weight: float = 1.0
    digest: str | None = None


@dataclass(frozen=True)
class PreparedData:
    """Description of a directory that `flextron prepare` wrote, read from its data.json.

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
        split: shares of training, validation and test documents in every domain's one corpus, as Megatron's text of three
            numbers; None if the splits have files of their own.
    """

    path: Path
    tokenizer: Path
    vocab_size: int
    eod: int
    domains: dict[str, Domain]
    fingerprint: str
    own_tokens: bool = False
    split: str | None = None


def open_data(path: str | Path) -> PreparedData:
    """Description of a prepared directory, after a check that its token files and its tokenizer are complete.

    Raises FlextronError naming the file that is missing, damaged or truncated.
    """
    root = expanded(path)
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
    digest = hashlib.sha256(_without_paths(table) if "split" in table else text)
    try:
        domains = {}
        for name, entry in table["domains"].items():
            opened = _existing if entry.get("digest") else _own
            domains[name], found = opened(Domain(**entry), root, table.get("split"))
            digest.update(found)
        tokenizer = child(root, table["tokenizer"], file)
        own = any(table.get(key) is not None for key in ("add_bos", "parse_special_tokens"))
        if not tokenizer.is_dir():
            raise FlextronError(f"{tokenizer}: no such directory, but {DATA_FILE} names it as the tokenizer: {_AGAIN}")
        check_tokenizer_files(tokenizer)
        data = PreparedData(
            root, tokenizer, table["vocab_size"], table["eod"], domains, digest.hexdigest()[:16], own, table.get("split")
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise FlextronError(f"{file}: an entry is missing or invalid ({explain(error)}): {_AGAIN}") from None
    if not data.domains:
        raise FlextronError(f"{file}: lists no domain: {_AGAIN}")
    return data


def _without_paths(table: Mapping[str, Any]) -> bytes:
    """Content of data.json for the fingerprint: corpora outside of the directory may move."""
    entries = {name: {**entry, "train": "", "valid": ""} for name, entry in dict(table["domains"]).items()}
    return json.dumps({**table, "domains": entries}).encode()


def _own(domain: Domain, root: Path, split: str | None) -> tuple[Domain, bytes]:
    """(domain with full paths, digest of its files) of a domain whose token files are in the prepared directory.

    Raises FlextronError for a file that is missing, damaged or truncated.

    Args:
        domain: domain as in data.json, with paths relative to the directory.
        root: the prepared directory.
        split: unused; `_existing` has the same signature.
    """
    file, found = root / DATA_FILE, b""
    check_files(root, *(f"{getattr(domain, part)}.idx" for part in ("train", "valid")))
    for part in ("train", "valid"):
        found += digest_of(child(root, getattr(domain, part), file), getattr(domain, f"{part}_tokens"), _AGAIN)
    return replace(domain, train=str(root / domain.train), valid=str(root / domain.valid)), found


def _existing(domain: Domain, root: Path, split: str | None) -> tuple[Domain, bytes]:
    """(domain unchanged, digest of its files) of a domain whose corpus lies outside of the prepared directory.

    Raises FlextronError if the corpus changed since `prepare`.

    Args:
        domain: domain as in data.json, with absolute paths.
        root: the prepared directory, for the message.
        split: unused; `_own` has the same signature.
    """
    prefix = Path(domain.train or domain.valid)
    index = read_index(prefix, _AGAIN)
    if index.digest.hex() != domain.digest:
        raise FlextronError(f"{prefix}.bin: changed since data={root} was prepared: {_AGAIN}")
    return domain, index.digest


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
            left out or has weight 0 is not used. None: the weights of the data, which are equal for text that `prepare` read.

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
    if len(chosen) == 1:
        blend = (blend[0], None)
    return _build(data, seq_length, seed, cache_dir, [blend, None, None], [num_samples, 0, 0], surplus)


def valid_datasets(data: PreparedData, seq_length: int, seed: int, cache_dir: str | Path) -> dict[str, Dataset]:
    """{domain: dataset of one epoch of the domain's validation tokens}. Call on all ranks.

    Samples are {tokens, labels, position_ids: int64 [seq_length]; loss_mask: float32 [seq_length]}.

    Every token but the first is a label exactly once. The last sample is padded with token 0, and its loss_mask is 0 there.

    Args:
        data: prepared data.
        seq_length: tokens of a sample.
        seed: seed of Megatron's datasets; a cache is reused for the same seed only.
        cache_dir: directory for Megatron's sample indices.
    """
    found = {}
    for name, domain in data.domains.items():
        if domain.valid is None:
            continue
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
    """Dataset of one split, whose sample indices are read from the directory `cache`, or computed and written to it.

    Args:
        data: prepared data.
        seq_length: tokens of a sample.
        seed: seed of the order of samples.
        cache: directory of the sample indices.
        blends, sizes, surplus: path prefixes and weights of the split, its minimum number of samples, and the share of samples
            built beyond a domain's share, as for `_build`.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    with _quiet():
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            blend=next(filter(None, blends)) if data.split else None,
            split=data.split,
            blend_per_split=None if data.split else blends,
            path_to_cache=str(cache),
            tokenizer=_TokenizerFacts(data.vocab_size, data.eod, data.fingerprint),
            mid_level_dataset_surplus=surplus,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            drop_last_partial_validation_sequence=False,
        )
        if data.split:  # Megatron-Core builds the splits whose bounds are set
            config.split_matrix = [part if blend else None for part, blend in zip(config.split_matrix, blends, strict=True)]
        try:
            built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
        except Exception as error:
            if isinstance(error.__cause__, OSError):  # Megatron-Core wraps an OSError in a long message about shared storage
                raise error.__cause__ from None
            raise
    return next(dataset for dataset in built if dataset is not None)


def check_weights(data: PreparedData, weights: Mapping[str, float] | None) -> dict[str, float]:
    """{domain: weight} of the domains with a weight above 0. weights=None gives the weights of the data.

    Raises FlextronError, which names the key data_weights, for an unknown domain, for a weight that is not a finite number of at
    least 0, and if no weight is above 0.
    """
    trained = {name: domain.weight for name, domain in data.domains.items() if domain.train}
    if weights is None:
        return {name: float(weight) for name, weight in trained.items() if weight}
    for name, weight in weights.items():
        if name not in trained:
            raise FlextronError(
                f"data_weights: no domain '{name}' in {data.path}{nearest(name, trained)}: it has {', '.join(trained)}"
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise FlextronError(f"data_weights.{name}={weight!r} must be a number of at least 0")
    chosen = {name: float(weights[name]) for name in trained if weights.get(name)}
    if not chosen:
        raise FlextronError(f"data_weights: no domain has a weight above 0: give one to {' or '.join(trained)}")
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
