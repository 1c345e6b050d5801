"""Comparison of files with the digests recorded when they were written (digests.py).

`verify` and `accept` are for all files below a path, `verify_inputs` for the files that a stage opens. A description is a JSON
file that lists the files of its directory with their sizes and digests: digests.json, or flextron.json of a checkpoint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flextron_mcore import digests
from flextron_mcore.checkpoint.store import INFO_FILE, list_checkpoints
from flextron_mcore.config import FlextronError
from flextron_mcore.digests import CONFIG_FILE, DATA_FILE, DIGESTS_FILE, Entry
from flextron_mcore.files import read_json
from flextron_mcore.runs.inputs import input_paths
from flextron_mcore.runs.output import METRICS_FILE
from flextron_mcore.runs.terminal import warn
from flextron_mcore.runtime.disk import write_whole
from flextron_mcore.runtime.ranks import gather, place
from flextron_mcore.settings.training import StageSettings


@dataclass(frozen=True)
class Verified:
    """Result of comparing files with the digests recorded when they were written.

    Attributes:
        files: number of files that have a digest.
        bytes: total size of these files when they were written.
        faults: a message for each file that is missing or changed, and for each directory without digests.
        unlisted: paths of files without a digest, in directories whose other files have one.
    """

    files: int
    bytes: int
    faults: Sequence[str]
    unlisted: Sequence[str]


def verify(path: Path) -> Verified:
    """Compare the files at or below `path` with their digests.

    Raises FlextronError if `path` does not exist, or no file there has a digest.

    path: a file, or a directory: the output of a stage, a directory within one, or one that holds several.
    """
    path = _existing(path)
    faults: list[str] = []
    entries: dict[Path, Entry] = {}
    unlisted: list[str] = []
    descriptions = _descriptions(path)
    for file in descriptions:
        try:
            found = _entries(file)
        except FlextronError as error:
            faults.append(_without_remedy(error))
            continue
        entries |= {each: entry for each, entry in found.items() if each == path or path in each.parents}
        if path in file.parents:
            unlisted += [str(file.parent / name) for name in digests.listed(file.parent)]
        if not digests.is_sealed(_json(file)):
            faults.append(f"{file} was written by an earlier version, which recorded no digests")
    unlisted = [name for name in unlisted if Path(name) not in entries and Path(name).name != INFO_FILE]
    loose = [path] if path.is_file() else [file for folder in _folders(path) for file in folder.glob("*.json")]
    for file in loose:  # such as the network that `flextron select` writes
        if (path.is_file() or file not in (*entries, *descriptions)) and digests.is_sealed(values := _json(file)):
            entries.setdefault(file, {"bytes": file.stat().st_size})
            try:
                digests.unseal(values, file)
            except FlextronError as error:
                faults.append(_without_remedy(error))
    if path.is_dir():
        faults += [f"{folder} was written by an earlier version, which recorded no digests" for folder in _undescribed(path)]
    if not entries and not faults:
        raise FlextronError(
            f"path={path}: nothing in it has a digest, so it cannot be verified: name the out of a stage, or a file in one"
        )
    faults += _faults(entries)
    return Verified(len(entries), sum(entry["bytes"] for entry in entries.values()), list(dict.fromkeys(faults)), unlisted)


def accept(path: Path) -> list[str]:
    """Record the digests of the files at or below `path` as they are now, and return the faults that `verify` found before.

    Raises FlextronError if `path` does not exist, if no file there has a digest, and for a damaged flextron.json, which cannot be
    made again from other files.
    """
    path = _existing(path)
    before = verify(path)
    descriptions = _descriptions(path)
    for file in [each for folder in _folders(path) for each in folder.glob("*.json")] if path.is_dir() else [path]:
        if file.suffix == ".json" and digests.is_sealed(values := _json(file)) and digests.seal(values) != values:
            write_whole(file, json.dumps(digests.seal(values), indent=1) + "\n")
    for file in [*descriptions, *(folder / DIGESTS_FILE for folder in (_undescribed(path) if path.is_dir() else ()))]:
        _describe_again(file, path)
    return list(before.faults)


def _describe_again(file: Path, path: Path) -> None:
    """Write a description again, with the digests of the files at or below `path` as they are now; other entries stay.

    Args:
        file: digests.json or flextron.json.
        path: path whose files are recorded.

    Raises:
        FlextronError: `file` is a damaged flextron.json.
    """
    folder = file.parent
    values = _json(file)
    if file.name == DIGESTS_FILE and not isinstance(values, dict):
        values = {}
    if not isinstance(values, dict):
        raise FlextronError(f"{file}: is damaged, and cannot be made again from other files: bring it back from a copy")
    names = [name for name in digests.listed(folder) if name != INFO_FILE]
    if path != folder and path not in folder.parents:
        names = [name for name in names if folder / name == path or path in (folder / name).parents]
        now = dict(values.get("files", {}))
    else:
        now = {}
        if file.name == DIGESTS_FILE and (folder / CONFIG_FILE).is_file() and not (folder / METRICS_FILE).is_file():
            # Other files of an unfinished run still change.
            names = [name for name in names if name.partition("/")[0] in (CONFIG_FILE, "tokenizer")]
    now |= {name: digests.entry_of(folder / name) for name in names}
    write_whole(file, json.dumps(digests.seal({**values, "files": now}), indent=1) + "\n")


def verify_inputs(settings: StageSettings) -> None:
    """Compare the input files of a stage with their digests if verify_weights is true; ranks share the files. Call on all ranks.

    Compared are all files of the newest checkpoint, dataset or table that an input path holds, and of a run in `out`. Whatever
    verify_weights is, an input that an earlier version wrote without digests gives a warning. Raises FlextronError on every rank,
    naming the first file that is missing or changed.
    """
    paths = [Path(text) for key, text in input_paths(settings) if key.limits.role == "input"]
    for path in paths:
        if _is_early(path):
            warn(
                f"{path} was written by an earlier version, which recorded no digests, so changed files cannot be found: record "
                f"them with `flextron verify path={path} accept=true`"
            )
    if not getattr(settings, "verify_weights", False):
        return
    entries: dict[Path, Entry] = {}
    for path in [*paths, *([Path(settings.out)] if settings.out else [])]:
        for file in _opened(path):
            entries |= _entries(file)
    rank, ranks = place()
    mine = dict(sorted(entries.items())[rank::ranks])
    if faults := [fault for each in gather(_faults(mine)) for fault in each]:
        raise FlextronError(f"{faults[0]}: bring it back from a copy, or make it again")


def _opened(path: Path) -> list[Path]:
    """Descriptions that cover what a stage opens of an input: of a run's newest checkpoint, else of the directory itself.

    [] for a file, and for a directory without descriptions.
    """
    checkpoints = list_checkpoints(path)
    files = [checkpoints[-1] / INFO_FILE] if checkpoints else [path / INFO_FILE, path / DIGESTS_FILE]
    return [file for file in files if file.is_file()]


def _is_early(path: Path) -> bool:
    """True for a checkpoint, run or dataset that an earlier version wrote, without digests."""
    if not path.is_dir():
        return False
    if (path / DATA_FILE).is_file():
        return not (path / DIGESTS_FILE).is_file()
    described = [file for file in _opened(path) if file.name == INFO_FILE]
    return bool(described) and isinstance(values := _json(described[0]), dict) and not digests.is_sealed(values)


def _existing(path: Path) -> Path:
    """Real path of a file or directory. Raises FlextronError if it does not exist, or is neither."""
    if not path.exists():
        raise FlextronError(f"path={path}: no such file or directory: name the out of a stage")
    if not (path.is_dir() or path.is_file()):
        raise FlextronError(f"path={path}: is neither a file nor a directory: name the out of a stage")
    return path.resolve()


def _entries(file: Path) -> dict[Path, Entry]:
    """{path of a file: its size and digest} that the description `file` lists. Raises FlextronError if it is damaged."""
    found = digests.files_of(digests.read_description(file), file)
    return {file.parent / name: entry for name, entry in found.items()}


def _faults(entries: Mapping[Path, Entry]) -> list[str]:
    """Messages about files that are missing or changed. entries: {file: recorded size and digest}."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [found for found in pool.map(digests.damage, entries, entries.values()) if found]


def _descriptions(path: Path) -> list[Path]:
    """Files digests.json and flextron.json in and below the directory `path`, other than `path` itself.

    Without one there, and for a file: only the nearest of up to four directories above, because it may list `path`. [] if there
    is none.
    """
    below = [folder / name for folder in _folders(path) for name in (DIGESTS_FILE, INFO_FILE)] if path.is_dir() else []
    above = [folder / name for folder in path.parents[:4] for name in (INFO_FILE, DIGESTS_FILE)]  # RUN/checkpoints/iter_N/FILE
    for files in (below, above):
        if found := [file for file in files if file.is_file() and file != path]:
            return found if files is below else found[:1]
    return []


def _undescribed(path: Path) -> list[Path]:
    """Directories at or below `path` that have metrics.json (a complete stage) or data.json (a dataset), but no digests.json."""
    marks = (METRICS_FILE, DATA_FILE)
    return [each for each in _folders(path) if not (each / DIGESTS_FILE).is_file() and any((each / m).is_file() for m in marks)]


def _folders(path: Path) -> Iterator[Path]:
    """Directory `path` and all directories below it, except hidden ones and links."""
    yield path
    for each in sorted(path.iterdir()):
        if each.is_dir() and not each.is_symlink() and not each.name.startswith("."):
            yield from _folders(each)


def _json(file: Path) -> Any:
    """Value of a JSON file; None for a file that is missing or is not JSON."""
    try:
        return read_json(file) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None


def _without_remedy(error: FlextronError) -> str:
    """Message of an error without its advice, which `flextron verify` gives once for all faults."""
    return str(error).partition(": bring it")[0]
