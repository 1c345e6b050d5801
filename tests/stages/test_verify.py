"""Changed bytes: `flextron verify` finds them in every file of a run; stages refuse them in small files, and with
verify_weights=true in all that they open.

FLEXTRON_FLIPS: number of random single-bit flips; without it a sample is tried. docs/results/integrity.md has a run of 100.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flextron_mcore import digests
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import _is_whole, open_data
from flextron_mcore.latency.table import LatencyTable
from flextron_mcore.report.reader import collect
from flextron_mcore.runs.verification import accept, verify
from flextron_mcore.space import SubNetwork
from tests.routing_toy import write_table
from tests.stages.conftest import stage

FLIPS = int(os.environ.get("FLEXTRON_FLIPS", "40"))


@pytest.fixture(scope="module")
def run(chain, tmp_path_factory) -> Path:
    """The chain's directory, with what further stages write beside it."""
    root = tmp_path_factory.mktemp("verified") / "run"
    shutil.copytree(chain, root)
    elastic, data = f"checkpoint={root}/elastic", f"data={root}/data"
    stage("select", elastic, "budget=0.8 parameters", "selector=uniform", "measure=false", f"out={root}/net.json")
    stage("sensitivity", elastic, data, "limit_val_batches=1", f"out={root}/sensitivity")
    stage("evaluate", elastic, data, f"subnetwork={root}/net.json", "limit_val_batches=1", f"out={root}/evaluate")
    for name in ("hf", "megatron", "gguf"):
        stage("export", elastic, f"format={name}", "verify=false", f"subnetwork={root}/net.json", f"out={root}/{name}")
    stage("import", f"hf={root}/hf", f"out={root}/imported")
    stage("report", f"run={root}", f"out={root}/report")
    return root


def files(root: Path) -> list[Path]:
    """Files of a run but for the network of `select`, and TensorBoard's files, which no stage reads."""
    every = (path for path in sorted(root.rglob("*")) if path.is_file() and path.name != "net.json")
    return [path for path in every if "tensorboard" not in path.parts]


@contextmanager
def flipped(file: Path, place: int, bit: int) -> Iterator[bytes]:
    """A file with one bit changed; yields its content before, which it has again at the end."""
    before = file.read_bytes()
    after = bytearray(before)
    after[place] ^= 1 << bit
    file.write_bytes(after)
    try:
        yield before
    finally:
        file.write_bytes(before)


def flips(paths: list[Path], count: int, seed: int):
    """(file, place, bit): `count` of them, files in turn in a random order."""
    draw = random.Random(seed)
    order = draw.sample(paths, len(paths))
    for i in range(count):
        file = order[i % len(order)]
        if size := file.stat().st_size:
            yield file, draw.randrange(size), draw.randrange(8)


def same_json(before: bytes, after: bytes) -> bool:
    try:
        return json.loads(before) == json.loads(after)
    except ValueError:
        return False


def test_verify_finds_every_flip(run):
    """In every file of every stage; only TensorBoard's files, which no stage reads, have no digest."""
    found = verify(run)
    assert not found.faults and not found.unlisted and found.files > 150, found
    for file, place, bit in flips(files(run), FLIPS, seed=1):
        with flipped(file, place, bit) as before:
            faults = verify(run).faults
            if not (faults and all(str(file) in fault for fault in faults)):
                # The digest of a JSON description is that of its values: 1e-05 may become 1E-05.
                assert file.suffix == ".json" and same_json(before, file.read_bytes()), (file, place, bit, faults)
    assert not verify(run).faults


def opened_files(run: Path) -> dict[str, tuple[list[Path], object]]:
    """{what is opened: (its files that are checked whenever it is opened, function that opens it)}."""
    elastic = open_checkpoint(run / "elastic").path
    small = [path for path in elastic.iterdir() if path.suffix != ".distcp"]
    tokenizer = list((run / "elastic" / "tokenizer").iterdir())
    data = [run / "data" / "data.json", *(run / "data" / "tokenizer").iterdir(), *(run / "data").glob("*.idx")]
    reported = [file for name in ("data", "parent", "elastic", "evaluate") for file in (run / name).glob("*.json*")]
    return {
        "checkpoint": ([*small, *tokenizer], lambda: open_checkpoint(run / "elastic")),
        "data": (data, lambda: open_data(run / "data")),
        "sub-network": ([run / "net.json"], lambda: SubNetwork.from_file(run / "net.json")),
        "report": ([file for file in reported if file.name != "data.json"], lambda: collect(run)),
    }


@pytest.mark.parametrize("name", ["checkpoint", "data", "sub-network", "report"])
def test_a_flip_of_a_small_file_is_refused_when_it_is_opened(run, name):
    paths, opened = opened_files(run)[name]
    expected = opened()
    for file, place, bit in flips(paths, 2 * len(paths) + 10, seed=2):
        with flipped(file, place, bit):
            try:
                assert opened() == expected, (file, place, bit)  # such as 1E-05 for 1e-05
            except FlextronError as error:
                assert str(file) in str(error) and "\n" not in str(error)
    assert opened() == expected


@pytest.mark.parametrize("name", ["elastic", "data"])
def test_a_flip_of_weights_or_tokens_is_refused_with_verify_weights(run, tmp_path, name):
    keys = [f"checkpoint={run}/elastic", f"data={run}/data", "limit_val_batches=1", f"out={tmp_path}/out"]
    folder = open_checkpoint(run / "elastic").path if name == "elastic" else run / "data"
    paths = [path for path in folder.iterdir() if path.suffix in (".distcp", ".bin")]
    for file, place, bit in flips(paths, 3, seed=3):
        message = f"{file} is damaged: its bytes changed since it was written"
        with flipped(file, place, bit), pytest.raises(FlextronError, match=message) as error:
            stage("evaluate", *keys, "verify_weights=true")
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    stage("evaluate", *keys, "verify_weights=true")


def test_verify_takes_any_path_of_a_run(run):
    every = stage("verify", f"path={run}")
    assert every["files"] > 100 and every["bytes"] > 1_000_000
    newest = open_checkpoint(run / "elastic").path
    inner = (newest.parent, newest, newest / "common.pt", run / "elastic" / "tokenizer", run / "elastic" / "metrics.json")
    for path in (run / "elastic", *inner, run / "data", run / "net.json", run / "hf", run / "report" / "index.html"):
        assert 0 < stage("verify", f"path={path}")["files"] < every["files"]
    with pytest.raises(FlextronError, match="nowhere: no such file or directory: name the out of a stage"):
        stage("verify", f"path={run}/nowhere")
    with pytest.raises(FlextronError, match="nothing in it has a digest, so it cannot be verified"):
        stage("verify", f"path={Path(__file__).parent}")


def test_a_missing_file_is_found_and_a_new_one_is_named(run, tmp_path, capsys):
    root = tmp_path / "hf"
    shutil.copytree(run / "hf", root)
    (root / "notes.txt").write_text("mine")
    assert stage("verify", f"path={root}")["unlisted"] == [f"{root}/notes.txt"]
    assert f"without a digest: {root}/notes.txt" in capsys.readouterr().out
    (root / "config.json").unlink()
    with pytest.raises(FlextronError, match="hf/config.json is missing: bring it back from a copy, or, if the change is yours"):
        stage("verify", f"path={root}")


def test_a_change_of_ones_own_is_accepted(run, tmp_path):
    """A change is accepted of one file, or of all below a directory; other changed files stay found."""
    root = tmp_path / "run"
    shutil.copytree(run, root)
    folder = root / "elastic" / "tokenizer"
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, "mine": 1}))
    with pytest.raises(FlextronError, match="is damaged|is truncated"):
        open_checkpoint(root / "elastic")
    accept(folder / "tokenizer_config.json")
    with pytest.raises(FlextronError, match="special_tokens_map.json is"):
        open_checkpoint(root / "elastic")
    with pytest.raises(FlextronError, match="special_tokens_map.json is"):
        stage("verify", f"path={root}")
    stage("verify", f"path={root}", "accept=true")
    assert open_checkpoint(root / "elastic") and not verify(root).faults
    net = json.loads((root / "net.json").read_text())
    net["layers"][0]["ffn_hidden_size"] = 1
    (root / "net.json").write_text(json.dumps(net))
    with pytest.raises(FlextronError, match="net.json: changed since it was written: bring it back from a copy, or take it as"):
        SubNetwork.from_file(root / "net.json")
    stage("verify", f"path={root}/net.json", "accept=true")
    assert SubNetwork.from_file(root / "net.json").layers[0].ffn_hidden_size == 1


def test_what_an_earlier_version_wrote_opens_with_a_warning_and_is_recorded(run, tmp_path, capsys):
    root = tmp_path / "run"
    shutil.copytree(run, root)
    for file in root.rglob("digests.json"):
        if "cache" not in file.parts:
            file.unlink()
    for file in root.rglob("flextron.json"):
        values = json.loads(file.read_text())
        del values["digest"]
        file.write_text(json.dumps({**values, "files": {name: entry["bytes"] for name, entry in values["files"].items()}}))
    keys = [f"checkpoint={root}/elastic", f"data={root}/data", "limit_val_batches=1"]
    warnings = stage("evaluate", *keys, f"out={tmp_path}/one")["warnings"]
    assert [text.split(" ")[0] for text in warnings] == [f"{root}/elastic", f"{root}/data"]
    assert "was written by an earlier version, which recorded no digests" in capsys.readouterr().out
    with pytest.raises(FlextronError, match="which recorded no digests"):
        stage("verify", f"path={root}")
    stage("verify", f"path={root}", "accept=true")
    assert verify(root).files == verify(run).files
    assert all((root / file.relative_to(run)).is_file() for file in run.rglob("digests.json"))
    assert "warnings" not in stage("evaluate", *keys, f"out={tmp_path}/two")


def test_a_damaged_cache_of_sample_indices_is_made_again(run, tmp_path):
    root = tmp_path / "parent"
    shutil.copytree(run / "parent", root)
    file = next(path for path in sorted((root / "cache").rglob("*.npy")) if path.stat().st_size)
    with flipped(file, file.stat().st_size - 1, 0):
        with pytest.raises(FlextronError, match="is damaged: its bytes changed"):
            digests.check_files(file.parent)
        assert not _is_whole(file.parent)
    assert _is_whole(file.parent)


def test_a_flip_of_a_latency_table_is_refused(run, tmp_path):
    info = open_checkpoint(run / "elastic")
    file = write_table(run / "elastic", tmp_path / "latency.json")
    expected = LatencyTable.from_file(file, info.model, info.space)
    for _, place, bit in flips([file], 200, seed=4):
        with flipped(file, place, bit):
            try:
                assert LatencyTable.from_file(file, info.model, info.space) == expected
            except FlextronError as error:
                assert str(file) in str(error)


def test_a_broken_description_of_a_checkpoint_cannot_be_accepted(run, tmp_path):
    shutil.copytree(run / "parent", tmp_path / "parent")
    file = open_checkpoint(tmp_path / "parent").path / "flextron.json"
    file.write_text("{")
    with pytest.raises(
        FlextronError, match="flextron.json: is damaged, and cannot be made again from other files: bring it back"
    ):
        stage("verify", f"path={tmp_path}/parent", "accept=true")
