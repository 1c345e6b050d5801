"""Check that a command does not write over what it reads."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from flextron_mcore.config import FlextronError
from flextron_mcore.files import expanded, read_yaml
from flextron_mcore.runs.output import CONFIG_FILE
from flextron_mcore.settings.schema import Key, keys, texts, value_of
from flextron_mcore.settings.training import StageSettings

_LEVELS = 3  # directories below an input in which links are followed: RUN/checkpoints/iter_0000100/FILE


def check_inputs(settings: StageSettings) -> None:
    """Raise FlextronError if `settings.out` is, contains or lies inside an input of the stage, so that no input is overwritten.

    Inputs are the values of keys whose role in the schema is `input` or `collection` (the directory of a run's stages, which a
    report reads). Links are resolved, also those inside an input directory, and files are compared by their identity on disk.
    `out` may lie in a `collection`, as a new directory or in place of an earlier output of the same stage.
    """
    if not settings.out:
        return
    out = Path(settings.out).resolve()
    for key, text in input_paths(settings):
        if relation := _relation(out, Path(text), key, settings.stage):
            raise FlextronError(f"out={settings.out}: {relation} the input {key.name}={text}: choose another out")


def input_paths(settings: StageSettings) -> Iterator[tuple[Key, str]]:
    """(key, path as the user typed it) of every input that the settings name."""
    for key in keys(type(settings)).values():
        if key.limits.role in ("input", "collection"):
            for text in texts(value_of(settings, key)):
                if text != "builtin" or key.name != "input":  # "builtin" is no path: text that Python brings
                    yield key, text


def _relation(out: Path, given: Path, key: Key, stage: str) -> str | None:
    """Verb for the message "out ... the input": "is", "contains", "lies inside" or longer; None if `out` may be written.

    Args:
        out: real path of the output.
        given: path of the input.
        key: key that names the input.
        stage: name of the stage that writes `out`.
    """
    found = expanded(given).resolve()
    for place in (found, *_linked(found)):
        if place == out or _same(place, out):
            return "is"
        if any(parent == out or _same(parent, out) for parent in place.parents):
            return "contains"
    inside = [parent for parent in out.parents if parent == found or _same(parent, found)]
    if not inside:
        return None
    if key.limits.role == "collection":
        between = out.parents[: out.parents.index(inside[0])]
        if _stage_of(out) in (None, stage) and not any(map(_stage_of, between)):
            return None
        return "would replace or lie in a stage's directory of"
    return "lies inside"


def _linked(folder: Path, levels: int = _LEVELS) -> Iterator[Path]:
    """Targets (real paths) of the symbolic links in a directory and in its subdirectories, `levels` levels in all.

    Nothing for a file, and for a directory that cannot be read.
    """
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield Path(entry.path).resolve()
            elif levels > 1 and entry.is_dir():
                yield from _linked(Path(entry.path), levels - 1)


def _same(one: Path, other: Path) -> bool:
    """True if both paths exist and lead to the same file or directory."""
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _stage_of(folder: Path) -> str | None:
    """Name of the stage that wrote a directory, from its config.yaml; None if no stage did."""
    try:
        values = read_yaml(folder / CONFIG_FILE)
    except (OSError, ValueError):
        return None
    return values.get("stage") if isinstance(values, dict) else None
