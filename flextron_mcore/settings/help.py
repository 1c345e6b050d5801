"""Text of `flextron STAGE --help` and of docs/keys.md, from the schemas. No torch import.

Write the page with `python -m flextron_mcore.settings.help > docs/keys.md`.
"""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from flextron_mcore.settings.compose import STAGES, to_dict
from flextron_mcore.settings.schema import MISSING, Key, keys, show
from flextron_mcore.settings.training import StageSettings

PAGE = """# Keys

All keys of all stages; `flextron STAGE --help` lists those of one stage. This page is generated from the schemas in
`flextron_mcore/settings`: `python -m flextron_mcore.settings.help > docs/keys.md`.

Keys are given as `key=value`. Text is taken as you type it: `out=2024`, `hf=/d/my,model` and `'prompt=Hello, world'` need no
quotes beyond the shell's. `~` is expanded in paths. `null` means no value; for the word itself, quote it: `'out="null"'`. A list
is `[a,b]`, or one item without brackets; quote items that contain commas. A mapping is `{a: 1, b: 2}`.

| key | stages | default | allowed values | meaning |
|---|---|---|---|---|
"""


def title(schema: type[StageSettings]) -> str:
    """Summary of a stage: first line of its schema's docstring, with a small initial letter and without a full stop."""
    line = (schema.__doc__ or "").splitlines()[0].rstrip(".")
    return line[0].lower() + line[1:]


def values(key: Key) -> str:
    """Text of a key's allowed values, their unit, and the key without which it has no effect.

    Examples: `whole number of at least 1; steps`, `full | own; with selector=adaptive only`.
    """
    limits = key.limits
    words = " | ".join(limits.choices) or key.allowed.removeprefix("a ")
    listed = f"list of {words}" if limits.choices and key.type is list else words
    return "; ".join(filter(None, (listed, limits.unit, limits.only and f"with {limits.only} only")))


def stage_help(settings: StageSettings) -> str:
    """Text of `flextron STAGE --help`: a table of the stage's keys, each with its value in `settings`, limits and meaning.

    settings: instance of the stage's schema, whose required keys may be MISSING.
    """
    schema = type(settings)
    given = _flat(to_dict(settings), keys(schema))
    common = keys(StageSettings)
    rows = [(name, given[name], key) for name, key in keys(schema).items()]
    rows.sort(key=lambda row: (row[0].partition(".")[0] in common, "." in row[0], row[1] != MISSING))  # stable
    width = max(60, min(shutil.get_terminal_size((130, 24)).columns, 130))
    text = f"flextron {schema.stage}: {title(schema)}\n\n"
    text += "keys, given as key=value, with their values here; null: no value; ???: required; a list is [a,b], a mapping {a: 1}\n"
    before = ""
    for name, value, key in rows:
        group = name.rpartition(".")[0].partition(".")[0] or ("every stage" if name in common else "")
        text += f"\n{group}\n" if group != before else "" if text.count("\n") > 3 else "\n"
        before = group
        head = f"  {name}={_short(value)}"
        lines = textwrap.wrap(f"{key.limits.help} [{values(key)}]", width - 46, break_on_hyphens=False)
        if len(head) > 44:
            text += f"{head}\n" + "".join(f"{'':<46}{line}\n" for line in lines)
        else:
            text += f"{head:<46}" + f"\n{'':<46}".join(lines) + "\n"
    if schema.recipes:
        text += "\nrecipes: files of keys in conf/ and in directories given with --config-dir\n"
        text += "".join(f"  {group}={show(name)}\n" for group, name in schema.recipes.items())
    return text


def _short(value: Any) -> str:
    """Text of a value as a user types it; a mapping of more than 100 characters is shortened to {name: ..., ...}."""
    text = show(value)
    return show(dict.fromkeys(value, "...")) if len(text) > 100 and isinstance(value, dict) else text


def key_page() -> str:
    """Text of docs/keys.md: a table of all keys of all stages."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for stage, schema in STAGES.items():
        defaults = _flat(_defaults(schema), keys(schema))
        for name, key in keys(schema).items():
            row = (name, "required" if defaults[name] == MISSING else f"`{show(defaults[name])}`", values(key), key.limits.help)
            rows.setdefault(row, []).append(stage)
    ordered = sorted(rows.items(), key=lambda item: ("." in item[0][0], item[0][0]))
    text = PAGE
    for (name, default, allowed, help_), stages in ordered:
        where = "all" if len(stages) == len(STAGES) else ", ".join(stages)
        cells = (f"`{name}`", where, default, allowed, help_)
        text += f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"
    return text


def _defaults(schema: type[StageSettings]) -> dict[str, Any]:
    return to_dict(schema())


def _flat(nested: dict[str, Any], known: dict[str, Key]) -> dict[str, Any]:
    """{dotted name: value in a nested mapping} of all keys in `known`."""
    found = {}
    for name in known:
        value: Any = nested
        for part in name.split("."):
            value = value[part]
        found[name] = value
    return found


if __name__ == "__main__":
    print(key_page(), end="")
