"""From what a user typed, recipes of conf/ and the schema of a stage to its settings. No torch import."""

from __future__ import annotations

import functools
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flextron_mcore.config import FlextronError, nearest
from flextron_mcore.settings.launch import LaunchSettings, RunSettings
from flextron_mcore.settings.schema import MISSING, Key, check_value, checked, keys, parse, show
from flextron_mcore.settings.stages import STAGES
from flextron_mcore.settings.training import LoopSettings, StageSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig

SHARED = "training"  # launch's keys of all stages that train


def compose(
    stage: str,
    overrides: Sequence[str] = (),
    config_dirs: Sequence[str | Path] = (),
    values: Sequence[Mapping[str, Any]] = (),
    partial: bool = False,
) -> Any:
    """Settings of a stage: its schema's defaults, recipes, then `values` (nested mappings), then `overrides` (key=value).

    config_dirs: directories of recipes beside conf/. partial: required keys may be missing, and are MISSING. Raises
    FlextronError, one line with the key and what is allowed, for an unknown or missing key, a wrong type, a value out of range.
    """
    schema = STAGES[stage]
    chosen, typed = dict(schema.recipes), []
    for override in overrides:
        name, _, text = override.partition("=")
        name = name.lstrip("+")
        if name in chosen:
            chosen[name] = None if text == "null" else text
        else:
            typed.append((name, text))
    draft = _Draft(schema)
    for recipe in _recipes(stage, chosen, config_dirs):
        draft.fill(recipe, literal=False)
    for given in values:
        draft.fill(given, literal=True)
    for name, text in typed:
        draft.set_text(name, text)
    return draft.finish(partial)


def read(stage: str, file: Path) -> Any:
    """Settings of a stage from the file that `launch`, or a stage into its directory, wrote.

    Raises FlextronError when it is not one, or of another version.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FlextronError(f"--config {file}: cannot be read ({type(error).__name__})") from None
    if not isinstance(values, dict) or values.pop("stage", None) != stage:
        raise FlextronError(f"--config {file}: is not a configuration of {stage}")
    return compose(stage, values=[values])


def to_dict(settings: StageSettings) -> dict[str, Any]:
    """Plain types, for YAML: the stage, its keys, and last those of every stage."""
    common = [each.name for each in fields(StageSettings)]
    names = [each.name for each in fields(settings) if each.name not in common and each.name != "stage_keys"]
    own = getattr(settings, "stage_keys", {})
    return {"stage": settings.stage, **{name: _plain(getattr(settings, name)) for name in [*names, *common]}, **own}


def to_yaml(settings: StageSettings) -> str:
    """`to_dict` as YAML."""
    return as_yaml(to_dict(settings))


def as_yaml(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def missing(settings: StageSettings) -> list[str]:
    """Required keys that have no value, sorted."""
    flat = dict(_leaves(to_dict(settings), lambda name, value: isinstance(value, Mapping)))
    return sorted(name for name in keys(type(settings)) if flat.get(name) == MISSING)


def config_directory() -> Path:
    """The shipped recipes: inside an installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "model").is_dir():
            return folder
    raise FlextronError(f"{package}: the configuration files are missing from this installation; install flextron_mcore again")


def find_key(schema: type[StageSettings], name: str) -> tuple[type[StageSettings] | type[RunSettings], Key, str]:
    """Schema that owns a dotted key, the key, and what follows it in a key that holds a mapping (env_vars.NAME).

    With launch's, `STAGE.key` and `training.key` are keys of other schemas. Raises FlextronError for an unknown key.
    """
    head, _, rest = name.partition(".")
    if schema is LaunchSettings and rest and (head in STAGES or head == SHARED):
        if rest.startswith("run.") and head in STAGES:
            return RunSettings, *_find(keys(RunSettings), rest.removeprefix("run."), f"{head}: unknown key '{rest}'", "run.")
        if head in STAGES:
            return find_key(STAGES[head], rest)
        trained = [each for each in STAGES.values() if issubclass(each, LoopSettings)]
        known = {name: key for each in reversed(trained) for name, key in keys(each).items()}
        key, inner = _find(known, rest, f"launch: unknown key '{name}'")
        return next(each for each in trained if key.name in keys(each)), key, inner
    return schema, *_find(keys(schema), name, f"{schema.stage}: unknown key '{name}'")


def _find(known: Mapping[str, Key], name: str, complaint: str, prefix: str = "") -> tuple[Key, str]:
    """The key that a dotted name is of, and what follows it in a mapping. prefix: of all names, for the hint."""
    found, inner = name, ""
    while found and found not in known:
        found, _, last = found.rpartition(".")
        inner = f"{last}.{inner}" if inner else last
    if not found or (inner and known[found].type is not dict):
        raise FlextronError(complaint + nearest(prefix + name, [prefix + each for each in known]))
    return known[found], inner


class _Draft:
    """Values of a stage while they are gathered: an OmegaConf structured config."""

    def __init__(self, schema: type[StageSettings]) -> None:
        from omegaconf import OmegaConf

        self.schema, self.config = schema, OmegaConf.structured(schema)
        self.scratch: dict[type, DictConfig] = {}  # of other schemas, in which launch's STAGE.key is tried

    def fill(self, values: Mapping[str, Any], literal: bool) -> None:
        """Set all of a nested mapping. literal: its texts are no interpolations."""
        for name, value in _leaves(values, self._is_section):
            self._set(name, _escaped(value) if literal else value, value)

    def set_text(self, name: str, text: str) -> None:
        """Set a key as the user typed it, or several keys of a section: kv_cache={batch_size: 2, length: 16}."""
        if text.startswith("{") and self._is_section(name, {}):
            try:
                section = yaml.safe_load(text)
            except (yaml.YAMLError, ValueError):
                raise FlextronError(f"{self.schema.stage}: {name}={text} must be a mapping, {{key: value, ...}}") from None
            self.fill(functools.reduce(lambda inner, part: {part: inner}, reversed(name.split(".")), section), literal=True)
            return
        owner, key, inner = find_key(self.schema, name)
        value = parse(_ANY, text) if inner else parse(key, text)
        self._set(name, _escaped(value), value)

    def finish(self, partial: bool) -> Any:
        """The typed settings."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            values = OmegaConf.to_container(self.config, resolve=True)
        except OmegaConfBaseException as error:
            raise FlextronError(f"{self.schema.stage}: {' '.join(str(error).split())}") from None
        settings = checked(_instance(self.schema, values), self.schema.stage)
        if self.schema is LaunchSettings:
            _check_layouts(settings)
        if not partial and (lacking := missing(settings)):
            raise FlextronError(f"{self.schema.stage}: missing {', '.join(f'{key}=...' for key in lacking)}")
        return settings

    def _is_section(self, name: str, value: Any) -> bool:
        """True if a mapping at this dotted name holds keys, and is not the value of one."""
        if not isinstance(value, Mapping):
            return False
        head, _, rest = name.partition(".")
        if self.schema is LaunchSettings and (head in STAGES or head == SHARED):
            if not rest or rest == "run":
                return True
            schemas = [STAGES[head]] if head in STAGES else list(STAGES.values())
            return any(known.startswith(f"{rest}.") for schema in schemas for known in keys(schema))
        return any(known.startswith(f"{name}.") for known in keys(self.schema))

    def _set(self, name: str, value: Any, shown: Any) -> None:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        owner, key, inner = find_key(self.schema, name)
        config, where, leaf, tail = self.config, self.schema.stage, key.name, f".{inner}" if inner else ""
        if owner is not self.schema:  # launch's STAGE.key is tried in the schema that has it
            if owner not in self.scratch:
                self.scratch[owner] = OmegaConf.structured(owner)
            config, where = self.scratch[owner], name.partition(".")[0]
            if where == SHARED:
                where, key = self.schema.stage, replace(key, name=f"{SHARED}.{leaf}")
        try:
            if inner and OmegaConf.select(config, leaf) is None:
                OmegaConf.update(config, leaf, {}, merge=False)
            OmegaConf.update(config, leaf + tail, value, merge=False, force_add=bool(inner))
        except (OmegaConfBaseException, ValueError) as error:
            allowed = f"{key.allowed}{' or null' * key.optional}"
            raise FlextronError(f"{where}: {key.name}{tail}={show(shown)} must be {allowed}") from error
        if owner is not self.schema:
            found = functools.reduce(lambda node, part: node[part], (leaf + tail).split("."), OmegaConf.to_container(config))
            if found is not None and not inner and "${" not in str(found):
                check_value(key, found, where)
            OmegaConf.update(self.config, f"stage_keys.{name}", found, merge=False, force_add=True)


def _check_layouts(settings: LaunchSettings) -> None:
    """Raise FlextronError for a key in `layouts` that no stage has."""
    known = {name for schema in STAGES.values() for name in keys(schema)}
    for gpus, layout in settings.layouts.items() if settings.layouts != MISSING else ():
        for name, _ in _leaves(layout, lambda name, value: isinstance(value, Mapping)):
            if name not in known:
                raise FlextronError(f"launch: unknown key 'layouts.{gpus}.{name}'{nearest(name, known)}")


def _leaves(values: Mapping[str, Any], is_section: Callable[[str, Any], bool], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of a nested mapping."""
    for name, value in values.items():
        if is_section(f"{prefix}{name}", value):
            yield from _leaves(value, is_section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


_ANY = Key("", object, None, True, keys(StageSettings)["out"].limits)  # of what is in a mapping


def _escaped(value: Any) -> Any:
    """`value` with texts that OmegaConf takes as they are, whatever `${` they hold."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", value)
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return {name: _escaped(item) for name, item in value.items()} if isinstance(value, Mapping) else value


def _instance(schema: type, values: Mapping[str, Any]) -> Any:
    """An instance of a schema; unlike OmegaConf.to_object it keeps missing values, for `launch` to report."""
    hints = typing.get_type_hints(schema)
    made = {name: _instance(hints[name], value) if is_dataclass(hints[name]) else value for name, value in values.items()}
    return schema(**made)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    return value


def _recipes(stage: str, chosen: Mapping[str, str | None], config_dirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The chosen recipes, in the order of the groups."""
    folders = [*map(Path, config_dirs), config_directory()]
    options = []
    for group, name in chosen.items():
        name = chosen["model"] if name == "${model}" else name
        if name is None:
            continue
        known = sorted(
            {
                file.relative_to(folder / group).with_suffix("").as_posix()
                for folder in folders
                for file in (folder / group).rglob("*.yaml")
            }
        )
        if name not in known:
            raise FlextronError(f"{stage}: {group}={name} is not known{nearest(name, known)}: use one of {', '.join(known)}")
        options.append(f"+{group}={name}")
    return [_composed(tuple(options), tuple(str(Path(folder).resolve()) for folder in config_dirs))] if options else []


@functools.cache
def _composed(options: tuple[str, ...], config_dirs: tuple[str, ...]) -> dict[str, Any]:
    """Recipes merged by Hydra, interpolations unresolved."""
    import hydra  # slow to import, and stages without recipes do not need it
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    places = ",".join(f"'file://{folder}'" for folder in config_dirs)
    search = [f"hydra.searchpath=[{places}]"] if places else []
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
            return OmegaConf.to_container(hydra.compose(None, [*search, *options]))
    except (HydraException, OmegaConfBaseException) as error:
        raise FlextronError(f"{' '.join(option.lstrip('+') for option in options)}: {' '.join(str(error).split())}") from None
