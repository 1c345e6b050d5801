"""The command line: help, refusals, exit codes."""

from __future__ import annotations

import re
import signal

import pytest

from flextron_mcore import cli
from flextron_mcore.cli import EXITS, STAGES, main
from flextron_mcore.config import FlextronError
from flextron_mcore.runtime import signals
from flextron_mcore.settings.compose import compose, config_directory
from flextron_mcore.settings.help import title
from flextron_mcore.settings.schema import keys


@pytest.fixture(autouse=True)
def signal_handlers():
    """Restore the signal handlers of the tests' process after each command."""
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    yield
    for number, handler in zip(signals.SIGNALS, before, strict=True):
        signal.signal(number, handler)


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_usage_lists_every_stage(capsys):
    code, out, _ = call(capsys)
    assert code == 0 and all(re.search(rf"^  {name} ", out, re.M) for name in (*STAGES, *EXITS))
    assert call(capsys, "--version")[1].strip()


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_help_and_a_configuration(capsys, stage):
    code, out, _ = call(capsys, stage, "--help")
    printed = stage in ("select", "generate", "launch", "status", "verify")  # without out=, they print
    assert code == 0 and title(STAGES[stage]) in out and ("out=null " if printed else "out=??? ") in out
    assert all(f"\n  {key}=" in out for key in keys(STAGES[stage]))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["elastc"], "unknown stage 'elastc' (did you mean 'elastic'?): use one of prepare, pretrain"),
        (["elastic", "out=x"], "elastic: missing checkpoint=..., data=..."),
        (["elastic", "mod=x"], "elastic: unknown key 'mod' (did you mean 'mode'?)"),
        (["elastic", "model.optim.lrr=1"], "elastic: unknown key 'model.optim.lrr' (did you mean 'model.optim.lr'?)"),
        (["elastic", "max_steps=1"], "elastic: unknown key 'max_steps' (did you mean 'trainer.max_steps'?)"),
        (["elastic", "mode=flextron", "checkpint=x"], "elastic: unknown key 'checkpint' (did you mean 'checkpoint'?)"),
        (["pretrain", "model=tinny"], "pretrain: model=tinny is not known (did you mean 'tiny'?): use one of"),
        (
            ["elastic", "checkpoint=/nowhere", "data=/nowhere", "out=x", "model.context_parallel_size=2", "trainer.devices=8"],
            "model.context_parallel_size=2: the elastic attention is not context parallel",
        ),
        (["elastic", "checkpoint"], "'checkpoint' is not of the form key=value"),
        (["elastic", "mode=[a"], "elastic: "),
        (["prepare", "--config-dir", "/nowhere", "out=x"], "--config-dir /nowhere: no such directory"),
        (["evaluate", "checkpoint=/nowhere", "data=/nowhere", "out=x"], "/nowhere: no such directory"),
        (["export", "checkpoint=/nowhere", "format=onnx", "out=/tmp/never-written"], "format='onnx' is not known: use one of hf"),
        (["report", "run=/nowhere", "out=/tmp/never-written"], "run=/nowhere: no such directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, message):
    code, out, err = call(capsys, *arguments)
    assert code == 2 and not out
    assert err.startswith("flextron: error: ") and message in err and len(err.splitlines()) == 1


def test_unexpected_errors_are_one_line_unless_debug(capsys, monkeypatch):
    def fail(config):
        raise RuntimeError("wires crossed\nsecond line")

    monkeypatch.setattr(cli, "run_stage", fail)
    code, _, err = call(capsys, "report", "run=x", "out=y")
    assert code == 1 and err == "flextron: failed: RuntimeError: wires crossed; add debug=true for the traceback\n"
    code, _, err = call(capsys, "report", "run=x", "out=y", "debug=true")
    assert code == 1 and "Traceback" in err and err.endswith("flextron: failed: RuntimeError: wires crossed\n")


def test_a_stopped_training_has_an_exit_code_of_its_own(capsys, monkeypatch):
    monkeypatch.setattr(cli, "run_stage", lambda config: signals.stop(signal.SIGTERM, "elastic", 12))
    code, _, err = call(capsys, "report", "run=x", "out=y")
    line = "elastic: stopped by SIGTERM after step 12; its checkpoint is written: run the same command again to continue\n"
    assert code == 75 and err == line


def test_an_installation_without_configurations_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("flextron_mcore.settings.compose.__file__", str(tmp_path / "package" / "settings" / "compose.py"))
    with pytest.raises(FlextronError, match="package: the configuration files are missing from this installation"):
        config_directory()


def test_own_configuration_directory(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [tiny, _self_]\nnum_layers: 3\n")
    config = compose("pretrain", ["model=mine", "data=d", "out=o"], [str(tmp_path)])
    assert config.model.num_layers == 3 and config.model.hidden_size == compose("pretrain", partial=True).model.hidden_size


def test_values_of_all_kinds(tmp_path):
    assert compose("prepare", ["input={a: [x, y], b: z}", "out=o"]).input == {"a": ["x", "y"], "b": "z"}
    settings = compose("importance", ["space.heads=[0.5,8]", "data=o", "checkpoint='a b/c=d'", "out=x"])
    assert settings.space.heads == [0.5, 8] and settings.checkpoint == "a b/c=d"


def test_every_key_of_the_configuration_is_read_somewhere():
    """Every key has an effect: the last part of its name appears in the code of the package."""
    package = config_directory().parent / "flextron_mcore"
    package = package if package.is_dir() else config_directory().parent
    source = "".join(p.read_text() for p in package.rglob("*.py"))
    for stage in STAGES:
        for key in keys(STAGES[stage]):
            name = key.split(".")[-1]
            if stage == "quickstart" and (key.startswith("chain") or name in ("input", "model") or name.endswith("_steps")):
                continue  # the recipe puts it into the commands of the chain
            if stage == "launch" and name in ("base_results_dir", "data_dir"):
                continue  # other keys interpolate it
            assert re.search(rf"\b{name}\b", source), f"{stage}: {key}"
