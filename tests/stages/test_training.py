"""`flextron pretrain` and `flextron elastic`: outputs, refusals, continuing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flextron_mcore.checkpoint.store import list_checkpoints, open_checkpoint
from flextron_mcore.checkpoint.unpickling import read_metadata
from flextron_mcore.config import FlextronError
from flextron_mcore.training import checkpointing
from flextron_mcore.training.speed import MEASURED
from tests.stages.conftest import TRAIN, pretrain_keys, stage


def rows(run: Path, event: str) -> list[dict]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def elastic_keys(chain: Path, out: Path, *more: str) -> list[str]:
    return [
        f"checkpoint={chain}/sorted",
        f"data={chain}/data",
        "model.micro_batch_size=4",
        "model.global_batch_size=8",
        *TRAIN,
        f"out={out}",
        *more,
    ]


def test_outputs_of_a_training_run(chain):
    run = chain / "elastic"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["stage"] == "elastic" and metrics["steps"] == 6 and metrics["tokens"] == 6 * 8 * 32
    train = rows(run, "train")
    assert [row["step"] for row in train] == list(range(1, 7))
    assert all(len(row["subnetwork_losses"]) == 3 for row in train)
    validation = rows(run, "validation")
    assert [row["step"] for row in validation] == [0, 4, 6]
    assert {"full", "uniform 25% heads 25% ffn", "random 1"} <= validation[0]["losses"].keys()
    assert validation[-1]["losses"]["full"] < validation[0]["losses"]["full"]
    assert metrics["validation"]["first"] == validation[0]["losses"]
    assert [p.name for p in list_checkpoints(run)] == ["iter_0000003", "iter_0000006"]
    info = open_checkpoint(run)
    assert info.step == 6 and info.sorted and info.tokenizer.is_dir()
    assert list((run / "tensorboard").glob("events.*"))


def run_command(arguments: list[str], **kwargs) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    return subprocess.Popen(
        [sys.executable, "-m", "flextron_mcore", *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **kwargs,
    )


def test_kill_and_run_again_is_the_uninterrupted_run(chain, tmp_path):
    """After kill -9 in the middle, the same command continues with bit-equal losses."""
    more = ("trainer.max_steps=14", "trainer.val_check_interval=7", "model.seq_length=16")
    whole = run_command(["elastic", *elastic_keys(chain, tmp_path / "whole", *more)])
    killed = run_command(["elastic", *elastic_keys(chain, tmp_path / "killed", *more)])
    log = tmp_path / "killed" / "log.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and killed.poll() is None:
        if log.exists() and len(list_checkpoints(tmp_path / "killed")) >= 1 and '"step": 5' in log.read_text():
            killed.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    output, _ = whole.communicate(timeout=240)
    assert whole.returncode == 0, output
    assert "Warning" not in output  # of libraries, in this process or in one that it starts
    assert not (tmp_path / "killed" / "metrics.json").exists()
    again = run_command(["elastic", *elastic_keys(chain, tmp_path / "killed", *more)])
    output, _ = again.communicate(timeout=240)
    assert again.returncode == 0, output
    assert "continuing after step" in output and "continuing after step 0" not in output
    strip = lambda row: {k: v for k, v in row.items() if k not in MEASURED}  # noqa: E731
    for event in ("train", "validation"):
        expected, found = rows(tmp_path / "whole", event), rows(tmp_path / "killed", event)
        assert [strip(r) for r in found] == [strip(r) for r in expected]
    # Run a third time, the command is refused, because the run is complete, and changes nothing.
    third = run_command(["elastic", *elastic_keys(chain, tmp_path / "killed", *more)])
    output, _ = third.communicate(timeout=120)
    assert third.returncode == 2 and "this run is complete" in output and len(output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "change, message",
    [
        (["trainer.max_steps=0"], r"trainer.max_steps=0 must be at least 1"),
        (["model.seq_length=33"], r"model.seq_length=33 is not within 1..32, the model's max_position_embeddings"),
        (["model.global_batch_size=6"], r"model.global_batch_size=6 is not a multiple of model.micro_batch_size=4"),
        (["mode=flextrn"], r"mode='flextrn' is not known: use one of flextron, matformer"),
        (["trainer.precision=fp64"], r"trainer.precision='fp64' is not known: use one of fp32, bf16"),
        (["space.granularity=2"], r"is of another space: its granularity is 1, not 2"),
        (["space.ffn_hidden_size=[0.5,1.0]"], r"is of another space: its ffn_hidden_size is \[16, 32, 48, 64\], not \[32, 64\]"),
        (["space.multiple=48"], r"space.ffn_hidden_size: 16 is not a multiple of 48 \(space.multiple 48\); nearest: 48"),
        (["data_weights={cod: 1}"], r"cod"),
        (["distillation.weight=2"], r"distillation.weight=2.0 must be within 0..1"),
        (["budget_weights={0.9: -1}"], r"budget_weights=\{0.9: -1.0\} must be a mapping, each at least 0"),
        (["budget_weights={0.9: 1}", "mode=matformer"], r"has an effect with mode=flextron only: set that too"),
        (["trainer.devices=4"], r"4, but 1 process\(es\) were started"),
        (["model.tensor_model_parallel_size=2"], r"1 process\(es\) cannot hold model.tensor_model_parallel_size=2"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(chain, tmp_path, change, message):
    with pytest.raises(FlextronError, match=message) as error:
        stage("elastic", *elastic_keys(chain, tmp_path / "out", "trainer.max_steps=2", *change))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_existing_out_is_never_written_over(chain, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(FlextronError, match="exists already"):
        stage("elastic", *elastic_keys(chain, tmp_path / "mine", "trainer.max_steps=2"))
    with pytest.raises(FlextronError, match="was not written by flextron; choose another"):
        stage("elastic", *elastic_keys(chain, tmp_path / "mine", "trainer.max_steps=2", "overwrite=true"))
    with pytest.raises(FlextronError, match="was not written by flextron; choose another"):
        stage("evaluate", f"checkpoint={chain}/elastic", f"data={chain}/data", f"out={tmp_path}/mine", "overwrite=true")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(FlextronError, match="holds a run with trainer.max_steps=6, not 7"):
        stage("elastic", *elastic_keys(chain, chain / "elastic", "trainer.max_steps=7"))
    with pytest.raises(FlextronError, match="this run is complete"):
        stage("pretrain", *pretrain_keys(chain / "data"), "trainer.max_steps=6", f"out={chain}/parent")


def test_matformer_and_distillation_train(chain, tmp_path):
    stage("elastic", *elastic_keys(chain, tmp_path / "m", "trainer.max_steps=2", "mode=matformer", "distillation.weight=0.5"))
    names = rows(tmp_path / "m", "validation")[-1]["losses"]
    assert "full" in names
    assert all(row["loss"] == row["loss"] and len(row["subnetwork_losses"]) == 3 for row in rows(tmp_path / "m", "train"))


def test_budgets_are_drawn_by_their_weights(chain, tmp_path, capsys):
    keys = ["trainer.max_steps=6", "budget_weights={0.9: 1, 1: 1}", "num_subnetworks=2"]
    figures = stage("elastic", *elastic_keys(chain, tmp_path / "w", *keys))
    drawn = [budget for row in rows(tmp_path / "w", "train") for budget in row["budgets"]]
    assert len(drawn) == 12 and set(drawn) == {0.9, 1.0}
    assert figures["budgets_drawn"] == {f"{budget:g}": drawn.count(budget) for budget in (0.9, 1.0)}
    assert "draws sub-networks of about 0.9 of the parameters 50.0%, 1 of the parameters 50.0%" in capsys.readouterr().out
    full = [row["loss"] == loss for row in rows(tmp_path / "w", "train") for loss in row["subnetwork_losses"]]
    assert full == [budget == 1.0 for budget in drawn]


def test_synchronous_saves_and_bf16(chain, tmp_path):
    keys = ["trainer.max_steps=2", "trainer.precision=bf16", "exp_manager.checkpoint_callback_params.async_save=false"]
    stage("elastic", *elastic_keys(chain, tmp_path / "b", *keys))
    assert open_checkpoint(tmp_path / "b").dtype == "bf16"


def test_a_run_that_fails_publishes_the_save_in_flight(chain, tmp_path, monkeypatch):
    from flextron_mcore.training.loop import _Run

    step = _Run._step

    def fail_in_the_fourth(self, number, log):
        if number == 3:
            raise RuntimeError("wires crossed")
        step(self, number, log)

    monkeypatch.setattr(_Run, "_step", fail_in_the_fourth)
    with pytest.raises(RuntimeError, match="wires crossed"):
        stage("elastic", *elastic_keys(chain, tmp_path / "f", "trainer.max_steps=6"))
    assert [p.name for p in list_checkpoints(tmp_path / "f")] == ["iter_0000003"]
    monkeypatch.undo()
    stage("elastic", *elastic_keys(chain, tmp_path / "f", "trainer.max_steps=6"))
    assert [row["step"] for row in rows(tmp_path / "f", "train")] == list(range(1, 7))


def test_a_diverging_run_stops(chain, tmp_path):
    with pytest.raises(
        FlextronError,
        match=r"step \d+: the loss of (the full model|sub-network \d of 3) is (nan|inf): training diverged, lower model.optim.lr",
    ):
        stage(
            "elastic",
            *elastic_keys(chain, tmp_path / "d", "trainer.max_steps=30", "model.optim.lr=1e30", "model.optim.clip_grad=0.0"),
        )


def test_the_estimated_bytes_of_a_checkpoint_are_those_written(chain, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(checkpointing, "check_space", lambda folder, need: needed.append(need))
    stage("elastic", *elastic_keys(chain, tmp_path / "e", "trainer.max_steps=3"))
    folder = list_checkpoints(tmp_path / "e")[-1]
    written = sum(file.stat().st_size for file in folder.glob("*.distcp"))
    headers = 2048 * len(read_metadata(folder).storage_data)  # torch.save writes about 1.3 KiB more than a tensor's values
    assert len(needed) == 1 and needed[0] <= written < needed[0] + headers


def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(chain, make_disk):
    """A disk without room for the second checkpoint: one line, the first stays whole, and with room the run continues."""
    disk = make_disk("8m")
    keys = elastic_keys(chain, disk / "run", "trainer.max_steps=6")
    ballast = disk / "ballast"
    command = run_command(["elastic", *keys, "exp_manager.checkpoint_callback_params.async_save=false"])
    deadline = time.monotonic() + 120
    while command.poll() is None and time.monotonic() < deadline and not list_checkpoints(disk / "run"):
        time.sleep(0.01)
    with contextlib.suppress(OSError), ballast.open("wb") as file:
        while True:
            file.write(bytes(1 << 12))
            file.flush()
    output, _ = command.communicate(timeout=120)
    last = output.splitlines()[-1]
    assert command.returncode == 2 and "Traceback" not in output, output
    assert re.match(r"flextron: error: .*cannot be written: (No space left|.* needed, .* free)", last), output
    assert [p.name for p in (disk / "run" / "checkpoints").iterdir()] == ["iter_0000003"]
    ballast.unlink()
    again = run_command(["elastic", *keys])
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "continuing after step 3" in output, output
    assert [row["step"] for row in rows(disk / "run", "train")] == list(range(1, 7))


def test_dropout_continues_exactly_too(chain, tmp_path):
    """The random state is part of a checkpoint: a GPT-2 with dropout continues exactly from its middle."""
    import shutil

    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.2, attn_pdrop=0.2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    stage("import", f"hf={tmp_path}/hf", f"out={tmp_path}/imported")
    keys = [f"checkpoint={tmp_path}/imported", *elastic_keys(chain, tmp_path / "run", "trainer.max_steps=6")[1:]]
    stage("elastic", *keys)
    whole = rows(tmp_path / "run", "train")
    (tmp_path / "run" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "iter_0000006")
    stage("elastic", *keys)
    strip = lambda row: {k: v for k, v in row.items() if k not in MEASURED}  # noqa: E731
    assert [strip(row) for row in rows(tmp_path / "run", "train")] == [strip(row) for row in whole]


def test_a_second_phase_has_longer_samples(chain, tmp_path):
    """The result of a training at short samples is trained on at longer ones, as docs/own_model.md says."""
    keys = ["trainer.max_steps=2", "num_subnetworks=1"]
    stage("elastic", *elastic_keys(chain, tmp_path / "first", *keys, "model.seq_length=16"))
    more = [key for key in elastic_keys(chain, tmp_path / "second", *keys, "model.seq_length=32") if "checkpoint=" not in key]
    second = stage(
        "elastic", f"checkpoint={tmp_path}/first", *more, "exp_manager.checkpoint_callback_params.every_n_train_steps=2"
    )
    assert second["tokens"] == 2 * json.loads((tmp_path / "first" / "metrics.json").read_text())["tokens"] == 2 * 8 * 32
    before, after = (rows(tmp_path / name, "validation") for name in ("first", "second"))
    assert before[-1]["losses"]["full"] != after[0]["losses"]["full"]  # other samples, the same weights
    assert before[-1]["losses"]["full"] == pytest.approx(after[0]["losses"]["full"], abs=0.05)
