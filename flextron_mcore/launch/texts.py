"""Texts of a launch that reach a shell, sbatch, srun, or pyxis (Slurm's container plug-in): checks and quotes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError
from flextron_mcore.files import read_json
from flextron_mcore.launch.plan import Plan
from flextron_mcore.settings.launch import LaunchSettings
from flextron_mcore.settings.schema import show, texts

# Environment variables that bash sets or reads itself, and variables of the batch script: env_vars may not set them.
OF_BASH = {
    "DIRSTACK",
    "EUID",
    "FUNCNAME",
    "GROUPS",
    "HISTCMD",
    "IFS",
    "LINENO",
    "OPTIND",
    "PIPESTATUS",
    "POSIXLY_CORRECT",
    "PPID",
}
OF_BASH |= {
    "PS4",
    "RANDOM",
    "SECONDS",
    "SHELLOPTS",
    "SHLVL",
    "SRANDOM",
    "UID",
    "_",
    "EPOCHREALTIME",
    "EPOCHSECONDS",
    "OLDPWD",
    "PWD",
}
OF_SCRIPT = {
    "nodes",
    "nodes_array",
    "head_node",
    "head_node_ip",
    "exitcode",
    "begun",
    "end",
    "start",
    "watcher",
    "FLEXTRON_STOPPED",
    "FLEXTRON_STOP_AT",
    "FLEXTRON_JOB_END",
    "TORCHX_MAX_RETRIES",
}
OF_SCRIPT |= {"SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NNODES", "SLURM_NODEID", "SLURM_RESTART_COUNT", "SLURM_JOB_END_TIME"}
# sbatch's options that launch sets from other keys, or that would change what it prints, waits for or starts.
SET_BY_LAUNCH = {
    "account",
    "chdir",
    "dependency",
    "error",
    "export",
    "job-name",
    "kill-on-invalid-dep",
    "nodes",
    "ntasks-per-node",
}
SET_BY_LAUNCH |= {
    "array",
    "open-mode",
    "output",
    "parsable",
    "requeue",
    "no-requeue",
    "test-only",
    "time",
    "wait",
    "wrap",
    "help",
    "version",
}


def check_texts(settings: LaunchSettings, plan: Plan) -> None:
    """Raise FlextronError for a text of the launch that a shell, sbatch, srun or pyxis would change or refuse.

    No text may hold a line break or another control character; only cluster.setup, which is shell code, has several lines. Names
    of environment variables and of options are restricted. On Slurm, directories that appear in file patterns of Slurm or in
    mounts of pyxis are restricted too, because neither can escape its own special characters.
    """
    for key, text in _texts(settings, plan):
        _check_printable(key, text)
        if settings.cluster.type == "slurm" and "/nemo_run" in text:
            raise FlextronError(f"{key}={text}: NeMo-Run takes /nemo_run for its own directory: choose a path without that name")
    for name in settings.env_vars:
        _check_variable(name)
    if settings.cluster.type == "slurm":
        for job in plan.to_run:
            _check_options(job.cluster.additional_parameters)
        for setup in {job.cluster.setup for job in plan.to_run}:
            _check_setup(setup)
        _check_marks("run.results_dir", str(plan.results), "%\\", "Slurm's names of log files give them a meaning")
        if settings.cluster.use_container:
            for key, text in mounted(plan):
                _check_marks(key, text, ":,", "they separate the mounts of a container")
            for text in settings.container_mounts:
                _check_mount(text)


def mounted(plan: Plan) -> list[tuple[str, str]]:
    """(key, absolute path) of each directory or file that a container of the jobs must see."""
    found = [("run.results_dir", str(plan.results))]
    for job in plan.to_run:
        for key in ("data", "hf", "checkpoint", "teacher", "latency", "sensitivity", "tokenizer", "input", "paths", "subnetwork"):
            name = key if key in ("data", "hf") else f"{job.stage}.{key}"
            found += [(name, value) for value in texts(getattr(job.settings, key, None)) if value.startswith("/")]
    # A corpus is named by a prefix of its files: its directory is mounted.
    prefixes = [(key, prefix) for key, path in found if key == "data" for prefix in _corpora(Path(path))]
    prefixes += [(key, path) for key, path in found if key.endswith(".paths")]
    found = [(key, path) for key, path in found if not key.endswith(".paths")]
    return list(dict.fromkeys([*found, *((key, str(Path(prefix).parent)) for key, prefix in prefixes)]))


def _corpora(data: Path) -> list[str]:
    """Absolute prefixes of existing corpora that prepared data refer to in data.json; [] if that file cannot be read."""
    try:
        domains = read_json(data / "data.json")["domains"].values()
        return [each[part] for each in domains for part in ("train", "valid") if str(each[part]).startswith("/")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # `missing` (check.py) says what is wrong with the data
        return []


def quoted(words: list[str]) -> list[str]:
    """Each word quoted for a POSIX shell."""
    return [shlex.quote(word) for word in words]


def _texts(settings: LaunchSettings, plan: Plan) -> Iterator[tuple[str, str]]:
    """(key, text) of every text of the launch that reaches a shell or Slurm; texts in configuration files of stages do not."""
    yield "run.results_dir", str(plan.results)
    yield "run.name", settings.run.name
    yield "this Python", sys.executable
    if settings.cluster.use_container:
        yield "container", str(settings.container or "")
    for text in settings.container_mounts:
        yield "container_mounts", text
    for name, value in settings.env_vars.items():
        yield f"env_vars.{name}", "" if value is None else str(value)
    for job in plan.to_run:
        cluster = asdict(job.cluster)
        for name, value in cluster.items():
            if isinstance(value, str):
                yield f"cluster.{name}", value
        for text in cluster["srun_args"]:
            yield "cluster.srun_args", text
        for name, value in cluster["additional_parameters"].items():
            yield f"cluster.additional_parameters.{name}", str(value)
    yield from mounted(plan)


def _check_printable(key: str, text: str) -> None:
    """Raise FlextronError for a control character in the text of a key; cluster.setup may have line breaks and tabs."""
    allowed = "\n\t" if key == "cluster.setup" else ""
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") and character not in allowed:
            raise FlextronError(f"{key}={text!r}: holds {character!r}: write it without line breaks and control characters")


def _check_variable(name: str) -> None:
    """Raise FlextronError for a name in env_vars that is no variable's, or that bash or the batch script sets itself."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(name), re.ASCII):
        raise FlextronError(f"env_vars.{name}: is not the name of a variable: use letters, digits and _, not a digit first")
    if name in OF_BASH | OF_SCRIPT or name.startswith("BASH"):
        raise FlextronError(f"env_vars.{name}: the batch script's shell sets this variable itself: leave it out")


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise FlextronError for an entry of cluster.additional_parameters that is no option of sbatch, or one that launch sets."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            raise FlextronError(
                f"cluster.additional_parameters.{name}={show(value)}: is a mapping: write the option's value as text"
            )
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", str(name), re.ASCII):
            raise FlextronError(f"cluster.additional_parameters.{name}: is not an option of sbatch: use letters, digits, - and _")
        if str(name).replace("_", "-") in SET_BY_LAUNCH:
            raise FlextronError(f"cluster.additional_parameters.{name}: launch sets this option of sbatch itself: leave it out")


def _check_setup(lines: str | None) -> None:
    """Raise FlextronError for shell code in cluster.setup that bash cannot parse, such as an open quote or `if` without `fi`."""
    if not lines:
        return
    found = subprocess.run(
        ["/bin/bash", "-n"], input=f"{lines}\n", capture_output=True, text=True, check=False, env={"LC_ALL": "C"}
    )
    if found.returncode or found.stderr:
        said = (found.stderr.strip().splitlines() or ["no message"])[0]
        raise FlextronError(f"cluster.setup={lines!r}: bash cannot read it ({said}): write whole lines of shell code")


def _check_marks(key: str, text: str, marks: str, reason: str) -> None:
    """Raise FlextronError for a path with a character that has another meaning to Slurm or pyxis.

    Args:
        key: key of the path, for the message.
        text: the path.
        marks: characters that are not allowed.
        reason: meaning of these characters, for the message.
    """
    if any(mark in text for mark in marks):
        raise FlextronError(f"{key}={text}: holds one of {' '.join(marks)} ({reason}): choose a path without them")


def _check_mount(text: str) -> None:
    """Raise FlextronError for an entry of container_mounts that pyxis would refuse or misread."""
    parts = text.split(":")
    if "," in text or len(parts) not in (2, 3) or not all(parts):
        raise FlextronError(
            f"container_mounts={text}: is not a mount: write HOST:CONTAINER or HOST:CONTAINER:FLAGS, with paths without commas"
        )
