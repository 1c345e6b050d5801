"""Tasks of lm-evaluation-harness, loaded without a download, and without code of a foreign directory unless the user agrees.

Imports lm_eval, an optional package that takes seconds: import this module only where tasks are evaluated.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
import lm_eval
import lm_eval.utils
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment
from lm_eval.api.group import Group
from lm_eval.api.registry import metric_registry
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from flextron_mcore.config import FlextronError, nearest
from flextron_mcore.evaluation.heldout import KINDS, HeldoutTask
from flextron_mcore.files import expanded, explain, read_text

_TRUST = "tasks_trust_code=true"
# Entries of a task file that are only read, not run. Other data loaders unpickle, other metrics and prompts are Python files.
_LOADERS = ("json", "csv", "text", "parquet", "arrow")
_KEYS = {
    *("task", "task_alias", "tag", "group", "group_alias", "aggregate_metric_list", "include", "metadata", "dataset_path"),
    *("dataset_name", "dataset_kwargs", "training_split", "validation_split", "test_split", "fewshot_split", "output_type"),
    *("doc_to_text", "doc_to_target", "doc_to_choice", "description", "target_delimiter", "fewshot_delimiter", "num_fewshot"),
    *("metric_list", "generation_kwargs", "repeats", "should_decontaminate", "doc_to_decontamination_query", "gen_prefix"),
}


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks that are ready to be evaluated.

    Attributes:
        names: names as the user wrote them, of tasks, groups or tags.
        loaded: result of TaskManager.load: {"tasks", "groups", "group_map"}.
    """

    names: Sequence[str]
    loaded: Mapping[str, Any]

    @property
    def tasks(self) -> dict[str, Task]:
        """{name: task}, members of groups and tags included."""
        return self.loaded["tasks"]


def load_tasks(
    names: Sequence[str],
    heldout: Sequence[HeldoutTask] = (),
    folder: str | None = None,
    trust_code: bool = False,
    num_fewshot: int | None = None,
) -> LoadedTasks:
    """Load tasks by name, without a download.

    Args:
        names: names of lm_eval's tasks, groups and tags, of tasks in `folder`, and of `heldout`.
        heldout: tasks made from held-out text.
        folder: directory with task files (YAML); None for none.
        trust_code: True runs Python code that task files of `folder` name, and tasks that run code which a model wrote.
        num_fewshot: examples in front of each question; None: as the task defines.

    Raises:
        FlextronError: an unknown name, data that this machine does not have, a damaged task file, or code without `trust_code`.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    _stay_offline()
    if folder is not None and not Path(folder).is_dir():
        raise FlextronError(f"tasks_dir={folder}: no such directory: name one with task files of lm_eval (YAML)")
    if folder is not None and not trust_code:
        _refuse_code(Path(folder))
        # Templates of task files are programs, too.
        lm_eval.utils.env = _sandbox()
    made = {task.name: task for task in heldout}
    manager = TaskManager(include_path=folder, include_defaults=False)
    if not set(names) <= {*made, *manager.all_tasks}:
        manager = _stock(folder)
    objects: list[Any] = []
    for name in names:
        if name in made:
            objects.append(_from_rows(made[name]))
        elif name in manager.all_tasks:
            objects += _from_manager(manager, name)
        else:
            hint = nearest(name, [*KINDS, *manager.all_tasks])
            raise FlextronError(
                f"tasks: {name} is not known{hint}: use {', '.join(KINDS)}, a task of lm_eval, or one of tasks_dir="
            )
    try:
        found = LoadedTasks(names, manager.load(objects))
    except ValueError as error:  # a task that two groups share
        raise FlextronError(f"tasks={list(names)}: lm_eval refuses them together: {_short(error)}: evaluate them apart") from None
    for name, task in found.tasks.items():
        _prepare(name, task, num_fewshot, trust_code)
    return found


@functools.cache
def _stock(folder: str | None) -> TaskManager:
    """Index of lm_eval's own tasks, 14,000 files, and of those in `folder`."""
    return TaskManager(include_path=folder)


def _stay_offline() -> None:
    """Make datasets and huggingface_hub refuse downloads, as with HF_DATASETS_OFFLINE=1 and HF_HUB_OFFLINE=1."""
    os.environ["HF_DATASETS_OFFLINE"] = os.environ["HF_HUB_OFFLINE"] = "1"
    # Both read the variables when they are imported.
    datasets.config.HF_DATASETS_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()


def _sandbox() -> ImmutableSandboxedEnvironment:
    """Copy of lm_eval's environment of templates whose templates reach no Python."""
    theirs = lm_eval.utils.env
    made = ImmutableSandboxedEnvironment(undefined=theirs.undefined, keep_trailing_newline=theirs.keep_trailing_newline)
    made.filters.update(theirs.filters)
    return made


def _from_rows(task: HeldoutTask) -> ConfigurableTask:
    """Task of lm_eval from a task made from held-out text."""
    rows = datasets.DatasetDict({"test": datasets.Dataset.from_list(task.rows)})
    return ConfigurableTask(config={**task.config, "custom_dataset": lambda **_: rows})


def _from_manager(manager: TaskManager, name: str) -> list[Task | Group]:
    """Task, group, or tasks of a tag with this name. Raises FlextronError if lm_eval cannot load it, or its data are not here."""
    try:
        loaded = manager.load(name)
    except Exception as error:  # noqa: BLE001 - loaders of data sets raise anything
        entry = manager.task_index[name]
        config = entry.cfg or {}
        path, subset = config.get("dataset_path"), config.get("dataset_name")
        if _is_missing(error):
            arguments = ", ".join(repr(each) for each in (path, subset) if each)
            fetch = f'`python -c "import datasets; datasets.load_dataset({arguments})"`' if path else "datasets.load_dataset"
            raise FlextronError(
                f"tasks: {name}: this machine does not have its data{f' ({path})' if path else ''}, and flextron downloads "
                f"nothing: fetch it with {fetch} where there is a network, and set HF_HOME to that cache"
            ) from None
        raise FlextronError(f"tasks: {name}: lm_eval cannot load it: {_short(error)}: correct it, or leave it out") from None
    group = loaded["groups"].get(name)  # a name that is no group is a task, or a tag of several
    return [group] if group else list(loaded["tasks"].values())


def _is_missing(error: BaseException) -> bool:
    """True for an error of datasets or huggingface_hub which says that data are not in the cache."""
    text = f"{type(error).__name__} {error}"
    return isinstance(error, ConnectionError | FileNotFoundError) or any(
        word in text for word in ("Offline", "offline", "Couldn't find", "Couldn't reach", "LocalEntryNotFound")
    )


def _short(error: BaseException) -> str:
    """Type and message of an error in one line of about 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _prepare(name: str, task: Task, num_fewshot: int | None, trust_code: bool) -> None:
    """Set the number of examples and the seed of their choice, as lm_eval.simple_evaluate does.

    Args:
        name: name of the task, for messages.
        task: the task, changed in place.
        num_fewshot: examples in front of each question; None: as the task defines.
        trust_code: True allows a task that runs code which a model wrote.

    Raises:
        FlextronError: the task cannot be evaluated as asked.
    """
    if getattr(task, "UNSAFE_CODE", False) and not trust_code:
        raise FlextronError(f"tasks: {name} runs code that the model writes: set {_TRUST}, or leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise FlextronError(f"tasks: {name} asks about pictures or sound: leave it out")
    defined = task.get_config("num_fewshot")
    if num_fewshot is not None and defined == 0:
        raise FlextronError(f"num_fewshot={num_fewshot}: {name} is defined without examples: leave num_fewshot out")
    if num_fewshot is not None or defined is None:
        task.set_config("num_fewshot", num_fewshot or 0)
    task.set_fewshot_seed(1234)
    if task.OUTPUT_TYPE == "generate_until":
        asked = normalize_gen_kwargs(task.get_config("generation_kwargs") or {})
        if asked["do_sample"] or asked.get("num_beams", 1) != 1:
            raise FlextronError(f"tasks: {name} samples or searches beams, and only greedy decoding is supported: leave it out")


def _refuse_code(folder: Path) -> None:
    """Raise FlextronError naming the first task file of a directory, or one that it includes, that may run Python code."""
    own = Path(lm_eval.__file__).parent.resolve()
    waiting, seen = sorted(folder.rglob("*.yaml")), set()
    while waiting:
        file = expanded(waiting.pop(0)).resolve()
        if file in seen or file.is_relative_to(own):
            continue
        seen.add(file)
        try:
            node = yaml.compose(read_text(file), Loader=yaml.SafeLoader)
            tags = [each.tag for each in _nodes(node)] if node else []
            strange = next((tag for tag in tags if not tag.startswith("tag:yaml.org,2002:")), None)
            config = {} if strange or node is None else yaml.safe_load(read_text(file))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise FlextronError(f"tasks_dir: {file}: is not a task file: {explain(error)}: correct or remove it") from None
        reason = f"has the tag {strange}" if strange else _code(config)
        if reason:
            raise FlextronError(
                f"tasks_dir: {file}: {reason}, which may run Python code: read it, and set {_TRUST} if you trust the directory"
            )
        included = config.get("include", []) if isinstance(config, dict) else []
        waiting += [file.parent / str(each) for each in (included if isinstance(included, list) else [included])]


def _nodes(node: yaml.Node) -> Iterator[yaml.Node]:
    """All nodes of a YAML document, each once: an alias repeats a node."""
    waiting, seen = [node], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if isinstance(each, yaml.MappingNode):
            waiting += [part for pair in each.value for part in pair]
        elif isinstance(each, yaml.SequenceNode):
            waiting += each.value


def _code(config: Any) -> str | None:
    """Entry of a task's configuration that may run code, in words; None for a configuration that is only read."""
    if isinstance(config, list):
        return next((reason for each in config if (reason := _code(each))), None)
    if not isinstance(config, dict):
        return None
    if other := next((key for key in config if key not in _KEYS), None):
        return f"has the key {other}"
    if config.get("dataset_path", "json") not in _LOADERS:
        return f"has dataset_path: {config['dataset_path']}"
    if "://" in str(config.get("dataset_kwargs")):
        return "has an address in dataset_kwargs"
    for entry in config.get("metric_list") or []:
        if not isinstance(entry, dict) or entry.get("metric") not in metric_registry or entry.get("hf_evaluate"):
            return "has a metric that lm_eval does not define"
    members = config.get("task")
    return _code(members) if isinstance(members, list) else None
