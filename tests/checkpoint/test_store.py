"""Checkpoint directories: finding the newest, and naming damaged files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import xxhash

from flextron_mcore.checkpoint.store import CheckpointInfo, open_checkpoint
from flextron_mcore.config import FlextronError
from tests import toy
from tests.checkpoint.cases import case, stream


def test_directories_without_a_whole_checkpoint_are_refused(tmp_path):
    arch, space, model = case("llama")
    run = tmp_path / "run"
    info = stream(model, CheckpointInfo(arch, space), run)
    with pytest.raises(FlextronError, match="nowhere: no such directory"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FlextronError, match="empty: no checkpoint in it"):
        open_checkpoint(tmp_path / "empty")
    # an unfinished checkpoint and foreign files are ignored
    (run / "checkpoints" / ".iter_0000009.tmp").mkdir()
    (run / "checkpoints" / "iter_0000008.bak").mkdir()
    (run / "checkpoints" / "iter_0000008").write_text("a file")
    (run / "checkpoints" / "latest.txt").write_text("iter_0000000")
    assert open_checkpoint(run) == info and open_checkpoint(info.path) == info and open_checkpoint(run / "checkpoints") == info


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


SPOILT = {
    "truncated": (".metadata", cut, r"\.metadata is truncated: \d+ bytes, not \d+"),
    "emptied": ("__0_3.distcp", lambda file: file.write_bytes(b""), r"__0_3\.distcp is truncated: 0 bytes, not \d+"),
    "grown": ("__0_0.distcp", lambda file: file.write_bytes(file.read_bytes() + b"x"), r"__0_0\.distcp is damaged: \d+ bytes"),
    "lost": ("common.pt", Path.unlink, r"common\.pt is missing"),
    "no description": ("flextron.json", Path.unlink, r"flextron\.json is missing"),
    "half a description": ("flextron.json", cut, r"flextron\.json is damaged: not a checkpoint description"),
    "another description": ("flextron.json", lambda file: file.write_text("[1]"), r"flextron\.json is damaged"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_damage_is_seen_when_opened_and_nothing_older_is_taken(name, tmp_path):
    arch, space, model = case("llama")
    run = tmp_path / "run"
    older, newest = (toy.write(model, CheckpointInfo(arch, space, step=step), run) for step in (7, 10_000_000))
    assert open_checkpoint(run).step == 10_000_000
    file, spoil, message = SPOILT[name]
    spoil(newest / file)
    for path in (run, newest):
        with pytest.raises(FlextronError, match=message + f".*; remove {newest} to continue from iter_0000007$") as error:
            open_checkpoint(path)
        assert "\n" not in str(error.value)
    assert open_checkpoint(older).step == 7
    spoil(older / file)
    with pytest.raises(FlextronError, match=message + ".*; no older checkpoint beside it is complete: bring it back"):
        open_checkpoint(run)


def test_sizes_and_digests_are_recorded_and_not_asked_of_early_checkpoints(tmp_path):
    arch, space, model = case("llama")
    info = stream(model, CheckpointInfo(arch, space), tmp_path / "run")
    file = info.path / "flextron.json"
    values = json.loads(file.read_text())
    found = {p.name: p.read_bytes() for p in info.path.iterdir() if p != file}
    expected = {name: {"bytes": len(data), "xxh128": xxhash.xxh3_128(data).hexdigest()} for name, data in found.items()}
    assert values.pop("files") == expected and values.pop("digest") and info.verifiable
    for early in (values, {**values, "files": {name: len(data) for name, data in found.items()}}):
        file.write_text(json.dumps(early))
        assert open_checkpoint(info.path) == info and not open_checkpoint(info.path).verifiable
    with (info.path / "common.pt").open("ab") as grown:
        grown.write(b"x")
    with pytest.raises(FlextronError, match=r"common\.pt is damaged"):
        open_checkpoint(info.path)


def test_equal_checkpoints_have_equal_files(tmp_path):
    """Two saves of one model are equal byte by byte. torch alone would store a random id and the directory in .metadata."""
    arch, space, model = case("llama")
    one, other = (stream(model, CheckpointInfo(arch, space), tmp_path / name).path for name in ("one", "other"))
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_a_changed_byte_is_seen_when_opened_except_in_weights(tmp_path):
    arch, space, model = case("llama")
    folder = stream(model, CheckpointInfo(arch, space), tmp_path / "run").path
    for file in sorted(folder.iterdir()):
        before = file.read_bytes()
        flip(file, len(before) // 2)
        if file.suffix == ".distcp":
            assert open_checkpoint(folder)
        else:
            with pytest.raises(FlextronError, match=f"{file.name} is damaged: .*; no older checkpoint.* accept=true`$"):
                open_checkpoint(folder)
        file.write_bytes(before)
    assert open_checkpoint(folder)
