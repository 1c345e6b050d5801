"""Prepared data as datasets: a weighted blend of the domains to train on, one epoch of each to validate on.

Nothing here has a state: which samples step n sees is a function of n (`batch(dataset, range(n * size, (n + 1) * size))`).
`train_dataset` and `valid_datasets` need an initialised torch.distributed (one process is enough) and are called on all ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import FlextronError, nearest
from .prepare import DATA_FILE, DATA_VERSION
from .tokenizer import read_vocabulary

if TYPE_CHECKING:
    from torch.utils.data import Dataset

_PARTS, _SEEN = 16, 1 << 16  # bytes of each of the parts of a token file that its digest sees
SAMPLE_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


@dataclass(frozen=True)
class Domain:
    """One domain of prepared data: where its token files are (paths without .bin and .idx) and how much is in them."""

    train: str
    valid: str
    train_tokens: int
    valid_tokens: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class PreparedData:
    """Description of a directory that `prepare` wrote.

    `fingerprint` tells it from other data, wherever the directory is: it changes with the lengths of the documents, which is what
    cached sample indices depend on, and with their tokens, of which it sees a MiB a file.
    """

    path: Path
    tokenizer: Path
    vocab_size: int
    eod: int
    domains: dict[str, Domain]
    fingerprint: str


def open_data(path: str | Path) -> PreparedData:
    """Read data.json and check that the token files are there and whole. Raises FlextronError naming the file that is not."""
    root = Path(path).expanduser()
    file = root / DATA_FILE
    try:
        text = file.read_bytes()
        table = json.loads(text)
    except OSError as error:
        raise FlextronError(f"{file}: cannot be read ({error.strerror}); data= takes a directory that `prepare` wrote") from None
    except ValueError as error:
        raise FlextronError(f"{file}: is not valid JSON: {error}") from None
    if not isinstance(table, dict) or table.get("version") != DATA_VERSION:
        raise FlextronError(f"{file}: is not prepared data of version {DATA_VERSION}: run `prepare` again")
    digest = hashlib.sha256(text)
    try:
        domains = {}
        for name, entry in table["domains"].items():
            for split in ("train", "valid"):
                digest.update(_check_tokens(root / entry[split], entry[f"{split}_tokens"]))
            domains[name] = Domain(**{**entry, "train": str(root / entry["train"]), "valid": str(root / entry["valid"])})
        tokenizer = root / table["tokenizer"]
        if not tokenizer.is_dir():
            raise FlextronError(f"{tokenizer}: no such directory, which {DATA_FILE} names: run `prepare` again")
        data = PreparedData(root, tokenizer, table["vocab_size"], table["eod"], domains, digest.hexdigest()[:16])
    except (KeyError, TypeError, AttributeError) as error:
        raise FlextronError(
            f"{file}: lacks or misnames an entry ({type(error).__name__}: {error}): run `prepare` again"
        ) from None
    if not data.domains:
        raise FlextronError(f"{file}: lists no domain: run `prepare` again")
    return data


def train_dataset(
    data: PreparedData,
    seq_length: int,
    num_samples: int,
    seed: int,
    cache_dir: str | Path,
    weights: Mapping[str, float] | None = None,
) -> Dataset:
    """A blend of the training tokens of all domains, at least `num_samples` samples long; domains are repeated as needed.

    weights: domain -> share of the samples, in any unit; a domain left out or of weight 0 is not used; None gives all the same.
    A sample holds tokens, labels, position_ids (int64) and loss_mask (float32), each [seq_length].
    Raises FlextronError on an unknown domain or a weight that is not a number of at least 0.
    """
    chosen = check_weights(data, weights)
    total = sum(chosen.values())
    blend = ([data.domains[name].train for name in chosen], [weight / total for weight in chosen.values()])
    # Megatron rounds the samples of each domain up, and its blend may then take len(chosen) - 2 more of one than its share.
    surplus = 0.005 + len(chosen) / max(1.0, num_samples * min(blend[1]))
    return _build(data, seq_length, seed, cache_dir, [blend, None, None], [num_samples, 0, 0], surplus)


def valid_datasets(data: PreparedData, seq_length: int, seed: int, cache_dir: str | Path) -> dict[str, Dataset]:
    """Domain -> one epoch of its validation tokens; samples as in `train_dataset`.

    Every token but the first is a label exactly once: the last sample is filled up with token 0, where its loss_mask is 0.
    """
    found = {}
    for name, domain in data.domains.items():
        dataset = _build(data, seq_length, seed, cache_dir, [None, ([domain.valid], None), None], [0, None, 0], 0.0)
        # GPTDataset keeps the loss mask of the first sample it is asked for, with the filling masked out, and gives it to all
        # later ones: wrong if that was the last, partial sample. Without the cache each sample has its own.
        dataset.masks_and_position_ids_are_cacheable = False
        found[name] = dataset
    return found


def batch(dataset: Dataset, indices: Iterable[int]) -> dict[str, torch.Tensor]:
    """Samples as one batch: tokens, labels, position_ids (int64) and loss_mask (float32), each [len(indices), seq_length].

    Indices count on past the end of the dataset from its beginning.
    """
    samples = [dataset[i % len(dataset)] for i in indices]
    return {key: torch.stack([sample[key] for sample in samples]) for key in SAMPLE_KEYS}


@dataclass(frozen=True)
class _TokenizerFacts:
    """Tokenizer as far as Megatron's datasets need one: they neither encode nor decode."""

    vocab_size: int
    eod: int
    fingerprint: str
    pad: int = -1  # no token: what fills up the last sample, masked out of the loss

    @property
    def unique_identifiers(self) -> dict[str, Any]:
        """Identity of cached sample indices beside the path. The fingerprint lets data prepared anew be indexed anew."""
        return {"vocab_size": self.vocab_size, "eod": self.eod, "data": self.fingerprint}


def _build(
    data: PreparedData, seq_length: int, seed: int, cache_dir: str | Path, blends: list, sizes: list, surplus: float
) -> Dataset:
    """The one split (training or validation) that `blends` and `sizes` ask for."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    with _quiet():
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            blend_per_split=blends,
            path_to_cache=str(cache_dir),
            tokenizer=_TokenizerFacts(data.vocab_size, data.eod, data.fingerprint),
            mid_level_dataset_surplus=surplus,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            drop_last_partial_validation_sequence=False,
        )
        built = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    return next(dataset for dataset in built if dataset is not None)


def check_weights(data: PreparedData, weights: Mapping[str, float] | None) -> dict[str, float]:
    """The domains in use and their weights, by default all the same. Raises FlextronError naming the key data_weights."""
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
        raise FlextronError("data_weights: no domain has a weight above 0")
    return chosen


def check_tokenizer(data: PreparedData, tokenizer: Path | None) -> None:
    """Raise FlextronError when the data have another vocabulary than `tokenizer`, the tokenizer directory of a model.

    Nothing is compared where there is no such directory, or no vocabulary in JSON in it.
    """
    ours, models = read_vocabulary(data.tokenizer), read_vocabulary(tokenizer) if tokenizer else None
    if ours and models and (different := ours.difference(models)):
        token, i = different
        raise FlextronError(
            f"data={data.path}: prepared with another tokenizer than the model's, {tokenizer}: only one of the two has the token "
            f"{i} {token[:40]!r}: prepare the data with the model's tokenizer"
        )


def _check_tokens(prefix: Path, tokens: int) -> bytes:
    """Check a pair of token files against each other and the count in data.json; a digest of the .idx and parts of the .bin."""
    from megatron.core.datasets.indexed_dataset import DType

    index, binary = prefix.with_name(prefix.name + ".idx"), prefix.with_name(prefix.name + ".bin")
    try:
        with index.open("rb") as stream:
            # header, version, dtype code, sequences, documents (+1); then lengths, pointers, document boundaries
            head = stream.read(34)
            magic, version, code, sequences, documents = struct.unpack("<9sQBQQ", head.ljust(34, b"\0"))
            size = 34 + 12 * sequences + 8 * documents
            if magic != b"MMIDIDX\0\0" or version != 1 or index.stat().st_size != size:
                raise FlextronError(f"{index}: is truncated or not a Megatron index: run `prepare` again")
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256")
        held = binary.stat().st_size
        with binary.open("rb") as stream:
            for start in (*range(0, held, max(_SEEN, held // _PARTS)), max(0, held - _SEEN)):
                stream.seek(start)
                digest.update(stream.read(_SEEN))
    except OSError as error:
        raise FlextronError(f"{error.filename}: cannot be read ({error.strerror}): run `prepare` again") from None
    if held != tokens * DType.size(code):
        raise FlextronError(
            f"{binary}: is truncated or of other data: {held} bytes, not {tokens} tokens of {DType.size(code)} bytes"
        )
    return digest.digest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Megatron's dozen lines for every dataset, when logging shows INFO."""
    logger = logging.getLogger("megatron.core.datasets")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
