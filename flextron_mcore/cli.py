"""The command `flextron STAGE key=value ...`.

Light on imports: checkpoint writers are spawned processes that import the main module again.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from flextron_mcore.config import FlextronError, JobFailed, nearest
from flextron_mcore.runs.start import run_stage
from flextron_mcore.runtime import signals, watch
from flextron_mcore.runtime.memory import collect_rarely


def _end_with_parent() -> None:
    """Make the kernel end this helper process when its parent ends, however that does.

    Megatron-Core's checkpoint writer runs in helpers, forked and spawned, that would outlive a run killed by kill -9.
    """
    pr_set_pdeathsig = 1
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


# Spawned: multiprocessing runs the main module again under this name, which imports this one. Else it is an alias of __main__.
if getattr(sys.modules.get("__mp_main__"), "__name__", None) == "__mp_main__":
    _end_with_parent()
    importlib.import_module("flextron_mcore.runtime.cpu").import_megatron()  # which it needs in any case

STAGES = {
    "prepare": "text to Megatron datasets with a tokenizer",
    "pretrain": "train a parent model from scratch",
    "import": "a Hugging Face checkpoint to an elastic checkpoint",
    "importance": "rank neurons and heads, sort them, show what sorting gains",
    "elastic": "elastic continued training: the full model and random sub-networks together",
    "latency": "what every candidate of every block costs on this device",
    "router": "train routers, which choose the sub-network for a budget",
    "joint": "tune routers and model together",
    "gumbel": "train the model and one router for all axes together",
    "sensitivity": "what each block loses when it alone is made smaller",
    "family": "a model for each of several budgets: chosen, evaluated, exported",
    "select": "the sub-network for a budget: 0.6, 25ms, 3.4B, 8GiB",
    "compare": "selectors side by side, and random sub-networks of equal cost",
    "evaluate": "loss and perplexity a domain",
    "generate": "text from a sub-network, or with a choice for every token",
    "export": "a sub-network as a directory that loads elsewhere",
    "report": "one HTML page of a run, and family.json",
    "quickstart": "the whole chain on this machine",
    "launch": "stages as jobs of a Slurm cluster, each after the last; or here",
    "status": "what became of the jobs that were launched",
}
EXIT_BAD_INPUT, EXIT_INTERRUPTED = 2, 130
EXITS = {
    0: "done",
    1: "failed: anything unexpected, a rank that died",
    EXIT_BAD_INPUT: "bad input",
    signals.EXIT_STOPPED: "training stopped for SIGTERM, SIGUSR1 or trainer.max_time, with a checkpoint: run it again",
}
USAGE = "usage: flextron STAGE key=value ... [--config-dir DIR]\n       flextron STAGE --config FILE\n\nstages:\n"
USAGE += "".join(f"  {name:<12}{text}\n" for name, text in STAGES.items())
USAGE += "\nexit codes:\n" + "".join(f"  {code:<12}{text}\n" for code, text in EXITS.items())


class _Failure(NamedTuple):
    """How a command that does not succeed ends: a line on standard error, head and text, and an exit code.

    wait: seconds that a rank of many gives the others to name the cause, of which its own error may be a consequence.
    """

    head: str
    text: str
    code: int
    wait: float = 0.0


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; exits with one of EXITS, after one line on standard error if that is not 0.

    Of many ranks, only one prints that line.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    os.register_at_fork(after_in_child=_end_with_parent)
    collect_rarely()
    prepare_environment()
    signals.install(_stopped)
    try:
        failure = _attempt(argv)
    except signals.Stopped as stop:
        failure = _Failure("", str(stop), signals.EXIT_STOPPED)
        _mark_stopped()
    signals.ignore()
    sys.stdout.flush()
    ranks = watch.current()
    if failure and ranks:
        ranks.fail(*failure)
    if failure:
        print(failure.head + failure.text, file=sys.stderr)
        sys.exit(failure.code)
    if ranks:
        from flextron_mcore.runtime import distributed

        ranks.leave()
        distributed.shutdown()
    sys.exit(0)


def _mark_stopped() -> None:
    """Leave the file that $FLEXTRON_STOPPED names. A launcher may hide exit codes, and its script wants to run the job again."""
    file = os.environ.get("FLEXTRON_STOPPED")
    if file and os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            Path(file).touch()


def _stopped(text: str, code: int) -> NoReturn:
    """End this process for a signal, wherever it is."""
    with contextlib.suppress(RuntimeError):  # it was about to write there
        sys.stdout.flush()
    if ranks := watch.current():
        # torchrun stops the other ranks when one dies, perhaps before the watch has found out which.
        ranks.fail("", text, code, wait=watch.GRACE)
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"{text}\n".encode())
    os._exit(code)


def _attempt(argv: list[str]) -> _Failure | None:
    """Run the command; None if it succeeds."""
    debug = "debug=true" in argv
    try:
        watch.start()
        _main(argv)
        return None
    except KeyboardInterrupt:
        return _Failure("flextron: ", "interrupted", EXIT_INTERRUPTED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        wait = _wait_for_cause(error)
        if isinstance(error, FlextronError):
            return _Failure("flextron: error: ", " ".join(str(error).split()), EXIT_BAD_INPUT, wait)
        if isinstance(error, JobFailed):
            return _Failure("flextron: failed: ", " ".join(str(error).split()), 1, wait)
        line = (str(error).strip().splitlines() or [""])[0]
        hint = "" if debug else "; add debug=true for the traceback"
        return _Failure("flextron: failed: ", f"{type(error).__name__}: {line}{hint}", 1, wait)


def _wait_for_cause(error: BaseException | None) -> float:
    """How long another rank may be found to be the cause of an error: long for those of communication."""
    while error:
        if re.search("gloo|NCCL", str(error)) or type(error).__module__.startswith("torch.distributed"):
            return watch.SILENCE + 3 * watch.PERIOD
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return 0.0


def prepare_environment() -> None:
    """What must be set before torch is imported; call first of all."""
    # Threads that spin while they wait for each other are ten times slower when another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Megatron-Core reports every optional package it does not find; transformers every file it loads.
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\.")
    for name in ("megatron", "transformers", "torch.distributed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what it warns of when ranks end one after another
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def _main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    if argv[0] == "--version":
        from flextron_mcore import __version__

        print(__version__)
        return
    stage, *rest = argv
    if stage not in STAGES:
        raise FlextronError(f"unknown stage '{stage}'{nearest(stage, STAGES)}: use one of {', '.join(STAGES)}")
    config_dirs, overrides, file, help_wanted = [], [], None, False
    arguments = iter(rest)
    for argument in arguments:
        if argument in ("-h", "--help"):
            help_wanted = True
        elif argument.startswith("--config-dir"):
            value = argument.partition("=")[2] or next(arguments, "")
            if not Path(value).is_dir():
                raise FlextronError(f"--config-dir {value}: no such directory")
            config_dirs.append(value)
        elif argument.partition("=")[0] == "--config":
            file = Path(argument.partition("=")[2] or next(arguments, ""))
        elif "=" not in argument:
            raise FlextronError(f"'{argument}' is not of the form key=value")
        else:
            overrides.append(argument)
    if stage == "launch":
        overrides = [_launch_key(key) for key in overrides]
    config = compose(stage, overrides, config_dirs) if file is None else read_config(stage, file, overrides)
    if help_wanted:
        from omegaconf import OmegaConf

        print(f"flextron {stage}: {STAGES[stage]}\n\nkeys and their values (??? must be given):\n")
        print(OmegaConf.to_yaml(config), end="")
        return
    run_stage(config)


def _launch_key(override: str) -> str:
    """A key of a stage may be new to launch: the stage checks it. Images have a # in their names, which Hydra would read."""
    key, _, value = override.partition("=")
    if key.partition(".")[0] in (*STAGES, "training", "env_vars", "layouts") or key.startswith("cluster.additional_parameters"):
        return f"++{override}"
    return f"{key}='{value}'" if key == "container" and "#" in value and value[0] not in "'\"" else override


def read_config(stage: str, file: Path, overrides: Sequence[str]) -> Any:
    """The configuration of a stage that `launch` wrote. Raises FlextronError when it is not one, or of another version."""
    from omegaconf import OmegaConf

    if overrides:
        raise FlextronError(f"--config {file}: holds all keys, {overrides[0]} must be changed there")
    try:
        config = OmegaConf.load(file)
    except Exception as error:
        raise FlextronError(f"--config {file}: cannot be read ({type(error).__name__})") from None
    if not isinstance(config, Mapping) or config.get("stage") != stage:
        raise FlextronError(f"--config {file}: is not a configuration of {stage}")
    return merged(compose(stage), OmegaConf.to_container(config))


def merged(config: Any, values: Mapping[str, Any]) -> Any:
    """A stage's configuration with `values`, a nested mapping, in place of its own. Raises FlextronError for an unknown key."""
    from omegaconf import OmegaConf

    known = known_keys(config)
    for key in known_keys(OmegaConf.create(dict(values))):
        # what a stage lets free, {domain: weight} say, is a value of one of its keys
        while (
            key not in known and key.rpartition(".")[0] in known and not isinstance(_at(config, key.rpartition(".")[0]), Mapping)
        ):
            key = key.rpartition(".")[0]
        if key not in known:
            raise FlextronError(f"{config.stage}: unknown key '{key}'{nearest(key, known)}")
    OmegaConf.set_struct(config, False)
    return OmegaConf.merge(config, values)


def _at(config: Any, key: str) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.select(config, key, throw_on_missing=False)


def config_directory() -> Path:
    """The shipped configuration: inside an installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise FlextronError(f"{package}: the configuration files are missing from this installation; install flextron_mcore again")


def compose(stage: str, overrides: Sequence[str] = (), config_dirs: Sequence[str] = ()) -> Any:
    """The resolved configuration of a stage (OmegaConf). Raises FlextronError for an unknown key, naming the nearest."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides = list(overrides)
    search = [f"hydra.searchpath=[{','.join('file://' + str(Path(d).resolve()) for d in config_dirs)}]"] if config_dirs else []

    def composed(extra: Sequence[str]) -> Any:
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
            config = hydra.compose("config", [f"stage={stage}", *search, *extra])
        OmegaConf.resolve(config)
        return config

    try:
        return composed(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        message = str(error)
        # In a list of overrides Hydra names the culprit in different ways: look for the first key that the stage does not have.
        known = known_keys(composed([o for o in overrides if _is_group(o)]) if _composes(composed, overrides) else composed([]))
        for override in overrides:
            key = override.partition("=")[0].lstrip("+~").partition("@")[0]
            if key not in known and not _is_group(override):
                raise FlextronError(f"{stage}: unknown key '{key}'{nearest(key, known)}") from None
        if match := re.search(r"Could not find '([^']+)'", message):
            group, _, name = match[1].rpartition("/")
            folder = config_directory() / group
            options = sorted(p.stem for p in folder.glob("*.yaml")) if folder.is_dir() else []
            raise FlextronError(
                f"{stage}: {group}={name} is not known{nearest(name, options)}: use one of {', '.join(options)}"
            ) from None
        raise FlextronError(f"{stage}: {' '.join(message.split())}") from None


def _composes(composed: Any, overrides: Sequence[str]) -> bool:
    try:
        composed([o for o in overrides if _is_group(o)])
    except Exception:
        return False
    return True


def _is_group(override: str) -> bool:
    """Whether an override chooses a group's option (model=tiny) rather than a value."""
    key = override.partition("=")[0].lstrip("+~")
    return "." not in key and (config_directory() / key).is_dir()


def known_keys(config: Any, prefix: str = "") -> list[str]:
    """All keys of a configuration, a.b.c for nested ones."""
    from omegaconf import DictConfig, OmegaConf

    keys = []
    for name in config:
        keys.append(prefix + str(name))
        if not OmegaConf.is_missing(config, name) and isinstance(config[name], DictConfig):
            keys += known_keys(config[name], f"{prefix}{name}.")
    return keys
