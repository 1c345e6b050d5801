"""Digests of files and of JSON descriptions: made when they are written, checked when they are read. No torch import.

A sealed JSON object has the key `digest`, the hash of its other keys. The files of a directory are listed in a sealed object, its
description: {"files": {name: {"bytes": size, "xxh128": hash}}}. That is digests.json in the output of a stage and flextron.json
in a checkpoint. A file that was not written from its beginning to its end has a hash for each part: {first byte of a part: hash}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from flextron_mcore.config import FlextronError
from flextron_mcore.files import explain, read_json

DIGESTS_FILE = "digests.json"
CHECKPOINT_FILE = "flextron.json"  # description of a checkpoint (checkpoint/store.py)
DATA_FILE = "data.json"  # description of a dataset (data/prepare.py)
CONFIG_FILE = "config.yaml"  # mark of a stage's output
# Directories of a run that no description lists: logs; indices, which have their own.
_LOGS = ("tensorboard", "wandb", "mlflow", "cache")
_SEAL = "digest"
_CHUNK = 1 << 20

Entry = dict[str, Any]  # {"bytes": size, "xxh128": hash, or {first byte: hash} of parts}
# {(device, inode) of a file that this process wrote: (its size, its modification time in ns, its entry)}
_known: dict[tuple[int, int], tuple[int, int, Entry]] = {}


def hash_of(data: bytes) -> str:
    """Hash (XXH3, 128 bits) of bytes as 32 hexadecimal digits. It finds accidental changes, not deliberate ones."""
    return xxhash.xxh3_128_hexdigest(data)


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON object with the key `digest`, the hash of its other keys, added or brought up to date."""
    kept = {key: value for key, value in values.items() if key != _SEAL}
    return {**kept, _SEAL: _digest_of(kept)}


def is_sealed(values: Any) -> bool:
    """True for a JSON object with the key `digest`; objects that earlier versions or users wrote have none."""
    return isinstance(values, Mapping) and _SEAL in values


def unseal(values: Any, file: Path) -> Any:
    """JSON object without its key `digest`, after a check; a value that has no such key is returned as it is.

    Raises FlextronError naming `file` if the digest is not the hash of the other keys.
    """
    if not is_sealed(values):
        return values
    kept = {key: value for key, value in values.items() if key != _SEAL}
    if values[_SEAL] != _digest_of(kept):
        raise FlextronError(changed(file))
    return kept


def changed(file: Path) -> str:
    """Text of the error for a file that was found changed since it was written, with advice. Checks nothing."""
    return f"{file}: changed since it was written: {remedy(file)}"


def remedy(file: Path) -> str:
    """Advice for a message about a file that is missing or changed: two remedies, one of them a command."""
    return f"bring it back from a copy, or take it as it is now with `flextron verify path={file} accept=true`"


def _digest_of(values: Mapping[str, Any]) -> str:
    """Hash of a JSON object, whatever the order of its keys."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hash_of(text.encode())


class HashingFile:
    """Binary file for writing, in any order, that is hashed meanwhile. Closing it keeps its digest in memory for `entry_of`."""

    def __init__(self, path: str | os.PathLike, mode: str = "wb") -> None:
        self._path, self._file = Path(path), open(path, mode)
        self._parts: dict[int, tuple[int, Any]] = {}  # {first byte: (end, hash)}
        self._part, self._at = 0, 0

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        """Write bytes, or an array of bytes, at the current place; return their number."""
        view = memoryview(data)
        if not view.nbytes:
            return 0
        view = view.cast("B")
        end, digest = self._parts.get(self._part, (-1, None))
        if end != self._at:
            self._part, digest = self._at, xxhash.xxh3_128()
        digest.update(view)
        self._file.write(view)
        self._at += view.nbytes
        self._parts[self._part] = self._at, digest
        return view.nbytes

    def seek(self, place: int) -> int:
        """Go to a place, in bytes from the beginning, and return it."""
        self._at = self._file.seek(place)
        return self._at

    def close(self) -> None:
        """Close the file. Its digest is kept unless parts of it were skipped or written twice."""
        if self._file.closed:
            return
        self._file.close()
        starts = sorted(self._parts)
        ends = [self._parts[start][0] for start in starts]
        if starts and starts == [0, *ends[:-1]]:  # else parts overlap or leave a gap, and the file is read for its digest
            hashes = {str(start): self._parts[start][1].hexdigest() for start in starts}
            remember(self._path, {"bytes": ends[-1], "xxh128": hashes["0"] if len(hashes) == 1 else hashes})


def remember(file: Path, entry: Entry) -> None:
    """Keep the digest of a file as it is on disk now, for `entry_of`."""
    found = file.stat()
    _known[found.st_dev, found.st_ino] = found.st_size, found.st_mtime_ns, entry


def remembered() -> dict[tuple[int, int], tuple[int, int, Entry]]:
    """Digests of the files that this process wrote, to be sent to another rank and given to `learn` there.

    {(device, inode): (size, modification time in ns, entry)} of each file, as in os.stat.
    """
    return _known


def learn(others: Mapping[tuple[int, int], tuple[int, int, Entry]]) -> None:
    """Keep digests of files that other processes wrote, so that `entry_of` need not read them. others: their `remembered()`."""
    _known.update(others)


def entry_of(file: Path) -> Entry:
    """Size and digest of a file, without reading it if its digest is known and its size and modification time are unchanged.

    Known are files that this process wrote with HashingFile, and those given to `remember` and `learn`.
    """
    found = file.stat()
    size, time, entry = _known.get((found.st_dev, found.st_ino), (-1, -1, {}))
    if (size, time) == (found.st_size, found.st_mtime_ns) and entry["bytes"] == size:
        return entry
    return {"bytes": found.st_size, "xxh128": _read(file, 0, found.st_size)}


def _read(file: Path, start: int, end: int) -> str:
    """Hash of the bytes of a file from `start` to `end`."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while start < end and (count := stream.readinto(buffer[: end - start])):
            digest.update(buffer[:count])
            start += count
    return digest.hexdigest()


def listed(folder: Path) -> Iterator[str]:
    """Paths, relative to `folder` and sorted, of the files that its description is to list.

    Left out are digests.json, hidden files and directories except .metadata, event files and indices, and directories with a
    description of their own.
    """
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if not (path.name.startswith(".") or path.name in _LOGS or described(path)):
                yield from (f"{path.name}/{name}" for name in listed(path))
        elif path.is_file() and (path.name == ".metadata" or not path.name.startswith(".")) and path.name != DIGESTS_FILE:
            yield path.name


def described(folder: Path) -> bool:
    """True for a directory that has, or will have, a description of its own: a checkpoint or the output of a stage."""
    return any((folder / name).is_file() for name in (DIGESTS_FILE, CHECKPOINT_FILE, CONFIG_FILE))


def write_digests(folder: Path, upcoming: Mapping[str, str] | None = None, only: tuple[str, ...] | None = None) -> None:
    """Write digests.json in a directory: size and digest of each of its files, sorted by name; whole or not at all.

    Args:
        folder: directory.
        upcoming: {name: text} of files that the caller writes afterwards, which are listed, too.
        only: names of the files and directories in `folder` to list; None for all.
    """
    entries = {name: entry_of(folder / name) for name in listed(folder) if only is None or name.partition("/")[0] in only}
    for name, text in (upcoming or {}).items():
        data = text.encode()
        entries[name] = {"bytes": len(data), "xxh128": hash_of(data)}
    aside = folder / f".{DIGESTS_FILE}.tmp"
    try:
        aside.write_text(json.dumps(seal({"files": dict(sorted(entries.items()))}), indent=1) + "\n", encoding="utf-8")
        aside.replace(folder / DIGESTS_FILE)
    finally:
        aside.unlink(missing_ok=True)


def read_description(file: Path) -> dict[str, Any]:
    """JSON object in a description (digests.json or flextron.json), checked against its digest, which is left out.

    A flextron.json of an earlier version, without a digest, is not checked. Raises FlextronError if the file is missing or
    damaged.
    """
    try:
        values = read_json(file)
    except (OSError, ValueError, RecursionError) as error:
        raise FlextronError(f"{file}: is damaged ({explain(error)}): {remedy(file)}") from None
    if not isinstance(values, dict):
        raise FlextronError(f"{file}: is damaged (not a JSON object): {remedy(file)}")
    if file.name == DIGESTS_FILE and not is_sealed(values):  # no version wrote digests.json without a digest
        raise FlextronError(changed(file))
    return unseal(values, file)


def files_of(values: Mapping[str, Any], file: Path) -> dict[str, Entry]:
    """{name: size and digest} of the files that a description lists. An entry of an earlier version has a size only.

    Raises FlextronError for a list of another form, and for a name outside of the directory.

    values: content of the description, from `read_description`. file: path of the description, for the message.
    """
    entries = values.get("files", {})
    good = isinstance(entries, Mapping) and all(_is_entry(name, entry) for name, entry in entries.items())
    if not good:
        raise FlextronError(f"{file}: is damaged (its list of files): {remedy(file)}")
    return {name: {"bytes": entry} if isinstance(entry, int) else dict(entry) for name, entry in entries.items()}


def _is_entry(name: str, entry: Any) -> bool:
    """True for a valid entry whose name stays in the directory. Earlier versions wrote a size in bytes as entry."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return False
    if isinstance(entry, int):
        return True
    if not isinstance(entry, Mapping) or type(entry.get("bytes")) is not int:
        return False
    parts = entry.get("xxh128")
    return isinstance(parts, str) or (isinstance(parts, Mapping) and all(start.isascii() and start.isdigit() for start in parts))


def damage(file: Path, entry: Entry, content: bool = True) -> str | None:
    """Message, without advice, about a file that is missing or changed; None if it is as its entry says.

    Args:
        file: path of the file.
        entry: size and digest from a description.
        content: True: compare the digest, which reads the whole file; False: compare the size only.
    """
    if not file.is_file():
        return f"{file} is missing"
    if (found := file.stat().st_size) != entry["bytes"]:
        return f"{file} is {'truncated' if found < entry['bytes'] else 'damaged'}: {found} bytes, not {entry['bytes']}"
    if not content or "xxh128" not in entry:
        return None
    parts = entry["xxh128"]
    starts = {0: parts} if isinstance(parts, str) else {int(start): digest for start, digest in parts.items()}
    ends = [*sorted(starts)[1:], found]
    same = all(_read(file, start, end) == starts[start] for start, end in zip(sorted(starts), ends, strict=True))
    return None if same and 0 in starts else f"{file} is damaged: its bytes changed since it was written"


def check_files(folder: Path, *inside: str) -> bool:
    """Compare the files of a directory with the sizes and digests in its digests.json: True if they agree, False without one.

    Raises FlextronError naming the first file that is missing or changed.

    Args:
        folder: directory with digests.json.
        inside: names of files and directories in `folder`; only these are checked. Without names, all files are.
    """
    file = folder / DIGESTS_FILE
    if not file.is_file():
        return False
    for name, entry in files_of(read_description(file), file).items():
        if not inside or any(name == each or name.startswith(f"{each}/") for each in inside):
            if found := damage(folder / name, entry):
                raise FlextronError(f"{found}: {remedy(folder / name)}")
    return True


def check_file(file: Path) -> None:
    """Raise FlextronError if digests.json beside a file lists it, and it is missing or changed."""
    check_files(file.parent, file.name)
