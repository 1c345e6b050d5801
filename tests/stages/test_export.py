"""`flextron export` in every format: a whole directory or none, refusals in one line, parameters as counted by `select`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.exports.formats import FORMATS, get_format
from flextron_mcore.space import ElasticSpace, SubNetwork, count_parameters
from flextron_mcore.stages import export
from tests import toy
from tests.stages.conftest import stage

NO_GGUF = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
ALL = [pytest.param(name, marks=NO_GGUF if name == "gguf" else ()) for name in FORMATS]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Run directory with a random Llama of 2.8 MB, without a tokenizer."""
    arch = toy.config(num_attention_heads=8, num_query_groups=4, vocab_size=9000)
    space = ElasticSpace.build(arch, heads=[0.5, 1.0], ffn_hidden_size=[0.5, 1.0])
    folder = tmp_path_factory.mktemp("export") / "run"
    toy.write(toy.model(arch, space), CheckpointInfo(arch, space), folder)
    return folder


def by_layer(run: Path, file: Path) -> SubNetwork:
    """Write a network whose layers differ to `file`, and return it."""
    info = open_checkpoint(run)
    widths = zip(info.space.heads, info.space.ffn_hidden_size, strict=True)
    net = SubNetwork(info.model.hidden_size, tuple(info.space.layer_choice(info.model, *pair) for pair in widths))
    file.write_text(net.to_json())
    return net


def refused(folder: Path, message: str, *keys: str) -> None:
    """Assert in the context that the export is refused with one line, and `folder` stays as it is."""
    before = {path: path.stat().st_size for path in folder.rglob("*")}
    with pytest.raises(FlextronError, match=message) as caught:
        stage("export", "verify=false", *keys)
    assert "\n" not in str(caught.value)
    assert {path: path.stat().st_size for path in folder.rglob("*")} == before


@pytest.mark.parametrize("name", ALL)
def test_bad_input_is_refused_and_writes_nothing(name, run, tmp_path):
    key, out = [f"checkpoint={run}", f"format={name}"], tmp_path / "out"
    (tmp_path / "other.json").write_text(SubNetwork.full(toy.config(ffn_hidden_size=40, num_query_groups=2)).to_json())
    other = f"subnetwork={tmp_path}/other.json"
    if name != "hf_elastic":
        refused(tmp_path, r"other.json: layers\[0\].ffn_hidden_size 40 is", *key, other, f"out={out}")
        refused(tmp_path, "subnetwork= and budget=", *key, other, "budget=0.5", f"out={out}")
        refused(tmp_path, "none.json: no such file", *key, f"subnetwork={tmp_path}/none.json", f"out={out}")
    refused(tmp_path, "dtype='fp8' is not known", *key, "dtype=fp8", f"out={out}")
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    for more in ([], ["overwrite=true"]):
        refused(tmp_path, "was not written by flextron; choose another", *key, f"out={out}", *more)
    refused(tmp_path, "is a file", *key, f"out={out}/thesis.txt")


def test_an_unknown_format_is_refused(run, tmp_path):
    message = f"format='onnx' is not known: use one of {', '.join(FORMATS)}"
    refused(tmp_path, message, f"checkpoint={run}", "format=onnx", f"out={tmp_path}/out")


@pytest.mark.parametrize("name", ALL)
def test_a_full_disk_leaves_nothing(name, run, make_disk, monkeypatch):
    disk = make_disk("1m")
    keys = [f"checkpoint={run}", f"format={name}", f"out={disk}/out"]
    if name != "gguf":
        refused(disk, "iB needed", *keys)
    # The disk fills up while the export is written.
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(2**50, 0, 2**50))
    refused(disk, "cannot be written: No space left on device", *keys)
    # An existing export stays.
    (disk / "out").mkdir()
    (disk / "out" / "config.yaml").write_text("stage: export\n")
    refused(disk, "cannot be written: No space left on device", *keys, "overwrite=true")


@pytest.mark.parametrize("name", ALL)
def test_parameters_are_those_that_select_counts(name, run, tmp_path):
    chosen = stage("select", f"checkpoint={run}", "budget=0.995 parameters", "selector=uniform", f"out={tmp_path}/net.json")
    wanted = chosen["costs"]["parameters"]["value"]
    full = count_parameters(open_checkpoint(run).model)
    keys = [f"checkpoint={run}", f"format={name}", "verify=false"]
    if name == "hf_elastic":  # hf_elastic holds the full model
        assert stage("export", *keys, f"out={tmp_path}/out")["parameters"] == full
        return
    figures = stage("export", *keys, f"subnetwork={tmp_path}/net.json", f"out={tmp_path}/out")
    assert figures["parameters"] == wanted < full
    figures = stage("export", *keys, "budget=0.995 parameters", "selector=uniform", f"out={tmp_path}/again")
    assert figures["parameters"] == wanted
    net = by_layer(run, tmp_path / "by_layer.json")
    figures = stage("export", *keys, f"subnetwork={tmp_path}/by_layer.json", f"out={tmp_path}/by_layer")
    assert figures["parameters"] == count_parameters(open_checkpoint(run).model, net)


@pytest.mark.parametrize("name", ["hf", "megatron"])
def test_the_card_says_what_chose_the_network(name, run, tmp_path):
    by_layer(run, tmp_path / "net.json")
    keys = [f"checkpoint={run}", f"format={name}", "verify=false"]
    for more, said in (
        (["budget=0.995 parameters", "selector=uniform"], "| chosen by | selector uniform for parameters <= "),
        ([f"subnetwork={tmp_path}/net.json"], "| chosen by | the sub-network in net.json |"),
        ([], "| chosen by | the full model |"),
    ):
        stage("export", *keys, *more, f"out={tmp_path}/out", "overwrite=true")
        card = (tmp_path / "out" / "README.md").read_text()
        assert said in card and "No tokenizer" in card


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda right: {"logits": lambda *given: right.logits(*given) + 1e-3}, "logits differ by 1.00e-03 from the checkpoint's"),
        (lambda right: {"logits": lambda *given: right.logits(*given) * float("nan")}, "logits differ by nan"),
        (lambda right: {"write": lambda job: right.write(job) | {"parameters": 7}}, "export: wrote 7 parameters, counted"),
    ],
)
def test_an_export_that_is_wrong_is_refused(wrong, message, run, tmp_path, monkeypatch):
    right = get_format("hf")
    monkeypatch.setattr(export, "get_format", lambda name: replace(right, **wrong(right)))
    with pytest.raises(FlextronError, match=message):
        stage("export", f"checkpoint={run}", f"out={tmp_path}/out")
    assert not list(tmp_path.iterdir())


def test_megatron_is_verified_and_comes_back(run, tmp_path):
    """The export is read back by Megatron-Core's own layers; a uniform one opens as a flextron checkpoint, too."""
    info = open_checkpoint(run)
    net = info.space.uniform(info.model, 4, 24)
    (tmp_path / "net.json").write_text(net.to_json())
    keys = [f"checkpoint={run}", "format=megatron", f"subnetwork={tmp_path}/net.json", f"out={tmp_path}/out"]
    assert stage("export", *keys)["max_logit_difference"] < 1e-5
    again = open_checkpoint(tmp_path / "out")
    assert count_parameters(again.model) == count_parameters(info.model, net)
    figures = stage("export", f"checkpoint={tmp_path}/out", f"out={tmp_path}/as_hf")
    assert figures["max_logit_difference"] < 1e-5 and figures["parameters"] == count_parameters(info.model, net)


def test_sigterm_leaves_nothing(run, tmp_path):
    """SIGTERM during verification leaves nothing under `out`."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    command = [sys.executable, "-m", "flextron_mcore", "export", f"checkpoint={run}", f"out={tmp_path}/out"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while not (tmp_path / ".out.tmp" / "config.json").is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM and output.splitlines()[-1] == "flextron: stopped by SIGTERM", output
    assert not (tmp_path / "out").exists()
    # The next export is not disturbed by temporary files of the killed one.
    stage("export", f"checkpoint={run}", "verify=false", f"out={tmp_path}/out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
