"""Composition of a stage's settings from its schema's defaults, recipes of conf/ and typed keys. No torch import."""

from __future__ import annotations

import functools
import json
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from flextron_mcore.config import FlextronError, nearest
from flextron_mcore.families.directory import check_directory, read_config
from flextron_mcore.files import check_file, expanded, explain, parse_yaml, read_yaml
from flextron_mcore.settings.launch import OF_ALL_STAGES, ClusterSettings, LaunchSettings, RunSettings
from flextron_mcore.settings.schema import MISSING, Key, check_value, checked, keys, parse, show
from flextron_mcore.settings.stages import STAGES
from flextron_mcore.settings.training import LoopSettings, StageSettings

if TYPE_CHECKING:
    from omegaconf import DictConfig

_CONFIG_FILES = "pass a config.yaml that {} wrote, or a file that launch wrote"
_CALL = re.compile(r"\$\{\s*[\w.]+\s*:")  # `${resolver:...}` of OmegaConf, which may read the environment, unlike `${key}`
FROM_HF = "hf"  # launch: `model=hf` reads the architecture from the config.json of hf=
SHARED = "training"  # launch: `training.KEY=value` sets KEY for every stage that trains
# Sections of launch whose keys `STAGE.SECTION.KEY=value` sets for one stage.
PER_STAGE: dict[str, type] = {"run": RunSettings, "cluster": ClusterSettings}


def compose(
    stage: str,
    overrides: Sequence[str] = (),
    config_dirs: Sequence[str | Path] = (),
    values: Sequence[Mapping[str, Any]] = (),
    partial: bool = False,
) -> Any:
    """Validated settings of a stage: the schema's defaults, replaced by recipes, then by `values`, then by `overrides`.

    Args:
        stage: name of the stage, such as "elastic".
        overrides: `key=value` texts as typed; a recipe is chosen in the same way (`model=tiny`).
        config_dirs: directories of recipes, searched before conf/.
        values: nested mappings {key: value}.
        partial: True leaves required keys without a value at MISSING; False raises FlextronError for them.

    Returns:
        An instance of the stage's schema, `STAGES[stage]`.

    Raises:
        FlextronError: an unknown or missing key, a wrong type, a value out of range; one line with the key and what is allowed.
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
    of_hf = schema is LaunchSettings and chosen["model"] == FROM_HF
    chosen |= {"model": None, "launch": FROM_HF if chosen["launch"] == "${model}" else chosen["launch"]} if of_hf else {}
    draft = _Draft(schema)
    for recipe in _recipes(stage, chosen, config_dirs):
        try:
            draft.fill(recipe, literal=False)
        except FlextronError as error:
            given = " ".join(f"{group}={name}" for group, name in chosen.items() if name not in (None, "${model}"))
            text = str(error).removeprefix(f"{stage}: ")
            raise FlextronError(f"{stage}: {given} cannot be used here: {text}") from None
    for given in values:
        draft.fill(given, literal=True)
    for name, text in typed:
        draft.set_text(name, text)
    draft.prefer([name for name, _ in typed])
    if of_hf and not (partial and draft.config.hf is None):
        draft.fill_from_hf()
        for name, text in typed:  # typed keys replace those of config.json
            draft.set_text(name, text)
    return draft.finish(partial)


def read(stage: str, file: Path) -> Any:
    """Settings of a stage from a YAML file that `flextron launch` or the stage itself (OUT/config.yaml) wrote.

    Raises FlextronError if the file cannot be read, belongs to another stage, has unknown keys or invalid values, or trusts code.
    """
    try:
        values = read_yaml(file, given=True)
    except (OSError, ValueError) as error:
        raise FlextronError(f"--config {file}: cannot be read ({explain(error)}): {_CONFIG_FILES.format(stage)}") from None
    if not isinstance(values, dict) or values.pop("stage", None) != stage:
        raise FlextronError(f"--config {file}: is not a configuration of {stage}: {_CONFIG_FILES.format(stage)}")
    if values.get("tasks_trust_code"):  # the file may be somebody else's
        raise FlextronError(f"--config {file}: tasks_trust_code=true lets code run: type it, with the other keys, as key=value")
    return compose(stage, values=[values])


def to_dict(settings: StageSettings) -> dict[str, Any]:
    """Settings as a nested dict of plain types: "stage", the stage's own keys, then the keys that every stage has.

    For launch, keys of the form STAGE.key follow as nested mappings.
    """
    common = [each.name for each in fields(StageSettings)]
    names = [each.name for each in fields(settings) if each.name not in common and each.name != "stage_keys"]
    own = getattr(settings, "stage_keys", {})
    return {"stage": settings.stage, **{name: _plain(getattr(settings, name)) for name in [*names, *common]}, **own}


def to_yaml(settings: StageSettings) -> str:
    """Settings as the text of a YAML file that `read` accepts."""
    return as_yaml(to_dict(settings))


def as_yaml(values: Mapping[str, Any]) -> str:
    """Mapping of plain values as YAML text, with the order of keys kept."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def missing(settings: StageSettings) -> list[str]:
    """Sorted dotted names of the required keys that have no value (MISSING), and the first key of `one_of` if none has one."""
    flat = dict(_leaves(to_dict(settings), lambda name, value: isinstance(value, Mapping)))
    lacking = [name for name in keys(type(settings)) if flat.get(name) == MISSING]
    if settings.one_of and all(getattr(settings, name) is None for name in settings.one_of):
        lacking.append(settings.one_of[0])
    return sorted(lacking)


def config_directory() -> Path:
    """Directory of the shipped recipes: `conf` in the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "model").is_dir():
            return folder
    raise FlextronError(f"{package}: the configuration files are missing from this installation; install flextron_mcore again")


def find_key(schema: type[StageSettings], name: str) -> tuple[type[StageSettings] | type[RunSettings], Key, str]:
    """Look up a dotted name: (schema that has the key, the key, rest of the name within a mapping).

    Args:
        schema: schema of the stage that the user gave the key to. For launch, `STAGE.key` and `training.key` are found in the
            schemas of other stages.
        name: dotted name, such as `model.optim.lr`, or `env_vars.NAME` for an item of a key that holds a mapping.

    Returns:
        (schema, key, rest). The rest is "" unless the name leads into a mapping, such as "NAME" for `env_vars.NAME`.

    Raises:
        FlextronError: the key is unknown or was replaced; the message names the nearest known key, or what to set instead.
    """
    head, _, rest = name.partition(".")
    if name in schema.replaced:
        raise FlextronError(f"{schema.stage}: {name}= is no key any more: {schema.replaced[name]}")
    if schema is LaunchSettings and rest and (head in STAGES or head == SHARED):
        section, _, last = rest.partition(".")
        if section in PER_STAGE and last and head in STAGES:
            known = {each: key for each, key in keys(PER_STAGE[section]).items() if each not in OF_ALL_STAGES}
            return PER_STAGE[section], *_find(known, last, f"{head}: unknown key '{rest}'", f"{section}.")
        if head in STAGES:
            return find_key(STAGES[head], rest)
        trained = [each for each in STAGES.values() if issubclass(each, LoopSettings)]
        known = {name: key for each in reversed(trained) for name, key in keys(each).items()}
        key, inner = _find(known, rest, f"launch: unknown key '{name}'")
        return next(each for each in trained if key.name in keys(each)), key, inner
    return schema, *_find(keys(schema), name, f"{schema.stage}: unknown key '{name}'")


def _find(known: Mapping[str, Key], name: str, complaint: str, prefix: str = "") -> tuple[Key, str]:
    """(key of a dotted name in `known`, rest of the name within a mapping or "").

    Args:
        known: {dotted name: key}.
        name: dotted name to find.
        complaint: message of the FlextronError for an unknown key, before the hint.
        prefix: prefix of the names in the hint.
    """
    found, inner = name if all(name.split(".")) else "", ""  # a name such as `out.` has an empty part
    while found and found not in known:
        found, _, last = found.rpartition(".")
        inner = f"{last}.{inner}" if inner else last
    if "data" in known and name in ("data.paths", "data.split"):  # of NeMo
        raise FlextronError(
            f"{complaint}: describe Megatron corpora with `flextron prepare paths=[...] tokenizer=DIR out=DIR`, and set data=DIR"
        )
    if not found or (inner and known[found].type is not dict):
        hint = nearest(prefix + name, [prefix + each for each in known])
        raise FlextronError(complaint + (hint or f"; `flextron {complaint.partition(':')[0]} --help` lists the keys"))
    return known[found], inner


class _Draft:
    """Settings of a stage under construction, in an OmegaConf structured config, which checks types."""

    def __init__(self, schema: type[StageSettings]) -> None:
        from omegaconf import OmegaConf

        self.schema, self.config = schema, OmegaConf.structured(schema)
        self.scratch: dict[type, DictConfig] = {}  # {schema: config that checks the types of launch's STAGE.key}

    def fill(self, values: Mapping[str, Any], literal: bool) -> None:
        """Set all keys of a nested mapping. literal: True treats `${...}` in values as text, not as interpolation."""
        for name, value in _leaves(values, self._is_section):
            self._set(name, _escaped(value) if literal else value, value)

    def set_text(self, name: str, text: str) -> None:
        """Set a key from typed text, or all keys of a section from a typed mapping: kv_cache={batch_size: 2, length: 16}."""
        if text.startswith("{") and self._is_section(name, {}):
            try:
                section = parse_yaml(text)
            except ValueError:
                raise FlextronError(f"{self.schema.stage}: {name}={text} must be a mapping, {{key: value, ...}}") from None
            self.fill(functools.reduce(lambda inner, part: {part: inner}, reversed(name.split(".")), section), literal=True)
            return
        owner, key, inner = find_key(self.schema, name)
        item = _TEXT if key.of_texts else _ANY
        value = parse(item, text) if inner else parse(key, text)
        if inner and key.item is Any and text in ("true", "false"):
            value = text == "true"
        self._set(name, _escaped(value), value)

    def fill_from_hf(self) -> None:
        """Set the architecture from config.json of the directory in launch's key hf, and run.name, unless a recipe has one.

        Raises FlextronError if hf is not set, or its config.json is missing, damaged or of a model that is not supported.
        """
        from omegaconf import OmegaConf

        if self.config.hf is None:
            raise FlextronError("model=hf: missing hf=: set it to the directory of a Hugging Face model")
        path = expanded(self.config.hf).absolute()
        check_directory(path)
        found = read_config(path)[2].to_dict()
        self.fill({"model": {name: list(v) if isinstance(v, tuple) else v for name, v in found.items()}}, literal=True)
        if OmegaConf.is_missing(self.config.run, "name"):
            self.fill({"run": {"name": re.sub(r"[^A-Za-z0-9._-]+", "_", path.name).strip(".") or FROM_HF}}, literal=True)

    def finish(self, partial: bool) -> Any:
        """Validated settings: an instance of the schema, with interpolations resolved. partial: accept missing required keys."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        try:
            values = OmegaConf.to_container(self.config, resolve=True)
        except OmegaConfBaseException as error:
            text = str(error).partition("\n")[0]
            raise FlextronError(
                f"{self.schema.stage}: {error.full_key}: {text}: write a value, or in ${{}} the name of a key"
            ) from None
        settings = checked(_instance(self.schema, values), self.schema.stage)
        if self.schema is LaunchSettings:
            _check_layouts(settings)
        if not partial and (lacking := missing(settings)):
            raise FlextronError(f"{self.schema.stage}: missing {', '.join(f'{key}=...' for key in lacking)}")
        return settings

    def prefer(self, typed: Sequence[str]) -> None:
        """Let a typed `training.KEY` win over the KEY that a recipe has for a stage that trains, or for a layout.

        typed: dotted names of the keys that the user typed.
        """
        if self.schema is not LaunchSettings:
            return
        own = self.config.stage_keys
        sections = [(stage, own[stage]) for stage in own if stage in STAGES and issubclass(STAGES[stage], LoopSettings)]
        sections += [("layouts", layout) for layout in self.config.layouts.values() if "layouts" not in typed]
        for name in typed:
            head, _, key = name.partition(".")
            for owner, section in sections if head == SHARED else ():
                own_too = any(f"{owner}.{key}.".startswith(f"{other}.") for other in typed)
                if not own_too and (owner != "layouts" or key.startswith("model.")):
                    _remove(section, key.split("."))

    def _is_section(self, name: str, value: Any) -> bool:
        """True if the mapping at this dotted name is a section of keys, False if it is the value of a key."""
        if not isinstance(value, Mapping):
            return False
        head, _, rest = name.partition(".")
        if self.schema is LaunchSettings and (head in STAGES or head == SHARED):
            if not rest or rest in PER_STAGE:
                return True
            schemas = [STAGES[head]] if head in STAGES else list(STAGES.values())
            return any(known.startswith(f"{rest}.") for schema in schemas for known in keys(schema))
        return any(known.startswith(f"{name}.") for known in keys(self.schema))

    def _set(self, name: str, value: Any, shown: Any) -> None:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        owner, key, inner = find_key(self.schema, name)
        config, where, leaf, tail = self.config, self.schema.stage, key.name, f".{inner}" if inner else ""
        if owner is not self.schema:  # OmegaConf checks the type of launch's STAGE.key in a config of that stage's schema
            if owner not in self.scratch:
                self.scratch[owner] = OmegaConf.structured(owner)
            config, where = self.scratch[owner], name.partition(".")[0]
            if where == SHARED:
                where, key = self.schema.stage, replace(key, name=f"{SHARED}.{leaf}")
            elif section := next((each for each, schema in PER_STAGE.items() if schema is owner), None):
                key = replace(key, name=f"{section}.{leaf}")
        try:
            if key.type is bool and str(value).lstrip("+-").isdigit():  # OmegaConf takes any number as true or false
                raise ValueError("a number")
            if key.type is dict and key.item is float and isinstance(value, Mapping):
                value = {str(word): number for word, number in value.items()}  # YAML reads 0.5 as a number, names are text
            if key.of_texts and isinstance(value, Mapping):  # a YAML file's true; OmegaConf would write True
                value = {word: show(each) if isinstance(each, bool) else each for word, each in value.items()}
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
    """Raise FlextronError for a key in launch's `layouts` that no stage has."""
    known = {name for schema in STAGES.values() for name in keys(schema)}
    for gpus, layout in settings.layouts.items() if settings.layouts != MISSING else ():
        if not isinstance(layout, Mapping):
            raise FlextronError(
                f"launch: layouts.{gpus}={show(layout)} must hold keys of stages, such as {{model: {{micro_batch_size: 1}}}}"
            )
        for name, _ in _leaves(layout, lambda name, value: isinstance(value, Mapping)):
            if name not in known:
                raise FlextronError(f"launch: unknown key 'layouts.{gpus}.{name}'{nearest(name, known)}")


def _leaves(values: Mapping[str, Any], is_section: Callable[[str, Any], bool], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of each key in a nested mapping. is_section: function of both, True to descend into the value."""
    for name, value in values.items():
        if is_section(f"{prefix}{name}", value):
            yield from _leaves(value, is_section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


_ANY = Key("", object, None, True, keys(StageSettings)["out"].limits)  # key of any type, to parse an item of a mapping
_TEXT = replace(_ANY, type=str)


def _escaped(value: Any) -> Any:
    """Copy of `value` with every `${` escaped, so that OmegaConf takes it as text."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", lambda match: f"{match[1] * 2}\\${{", value)
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return {name: _escaped(item) for name, item in value.items()} if isinstance(value, Mapping) else value


def _instance(schema: type, values: Mapping[str, Any]) -> Any:
    """Instance of a schema, sections included, from a nested mapping of values. Required keys may be MISSING.

    OmegaConf.to_object would raise at the first MISSING key; `finish` reports all of them together.
    """
    hints = typing.get_type_hints(schema)
    made = {name: _instance(hints[name], value) if is_dataclass(hints[name]) else value for name, value in values.items()}
    return schema(**made)


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    return value


def _recipes(stage: str, chosen: Mapping[str, str | None], config_dirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """List with one mapping, the keys of all chosen recipes merged in order; [] if none is chosen.

    chosen: {directory of conf/: name of the recipe, or None}. Raises FlextronError for an unknown recipe.
    """
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
            also = f"; {STAGES[stage].replaced[group]}" if group in STAGES[stage].replaced else ""
            raise FlextronError(
                f"{stage}: {group}={name} is not known{nearest(name, known)}: use one of {', '.join(known)}{also}"
            )
        for folder in config_dirs:
            check_file(Path(folder, group, f"{name}.yaml"), given=True)
        options.append(f"+{group}={name}")
    return [_composed(tuple(options), tuple(str(Path(folder).resolve()) for folder in config_dirs))] if options else []


@functools.cache
def _composed(options: tuple[str, ...], config_dirs: tuple[str, ...]) -> dict[str, Any]:
    """Nested mapping of the keys of recipes, merged by Hydra, with interpolations unresolved. options: "+GROUP=NAME" each."""
    import hydra  # imported here: slow, and stages without recipes do not need it
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    first, *others = *config_dirs, str(config_directory())  # the first that has a recipe wins
    places = ",".join(f"'file://{folder}'" for folder in others)
    search = [f"hydra.searchpath=[{places}]"] if places else []
    name = " ".join(option.lstrip("+") for option in options)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(first, version_base="1.3"):
            found = OmegaConf.to_container(hydra.compose(None, [*search, *options]))
    except FlextronError:
        raise
    except Exception as error:  # errors of Hydra, of OmegaConf, and of reading files that are not YAML
        text = " ".join(str(error).split())[:500] or "cannot be read"
        raise FlextronError(f"{name}: {text}") from None
    if call := _CALL.search(json.dumps(found, default=str)):
        raise FlextronError(f"{name}: {call[0]}...}} is not allowed in a recipe: write the value itself, or ${{KEY}}")
    return found


def _remove(section: Any, path: Sequence[str]) -> None:
    """Remove a value, which is no section, from nested sections, if it is there."""
    for name in path[:-1]:
        section = section.get(name) if hasattr(section, "get") else None
        if section is None:
            return
    if hasattr(section, "pop") and path[-1] in section and not hasattr(section[path[-1]], "keys"):
        section.pop(path[-1])
