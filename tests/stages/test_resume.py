"""Continuing a training run: only the same run, from a whole checkpoint, by one process at a time, without losing results."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml

from flextron_mcore.checkpoint.store import list_checkpoints, open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.runs.verification import accept
from tests.stages.conftest import TRAIN, finish_again, pretrain_keys, stage


@pytest.fixture
def tree(chain, tmp_path) -> Path:
    """Copy of the chain's directory in which both training runs have done three of six steps."""
    root = tmp_path / "tree"
    shutil.copytree(chain, root, ignore=shutil.ignore_patterns("tensorboard", "cache", "metrics.json"))
    for run in ("parent", "elastic"):
        shutil.rmtree(root / run / "checkpoints" / "iter_0000006")
    return root


def elastic_keys(root: Path) -> list[str]:
    sizes = ["model.micro_batch_size=4", "model.global_batch_size=8"]
    return [f"checkpoint={root}/sorted", f"data={root}/data", *sizes, *TRAIN]


def elastic(root: Path, *more: str, out: Path | None = None) -> dict:
    return stage("elastic", *elastic_keys(root), "trainer.max_steps=6", f"out={out or root / 'elastic'}", *more)


def pretrain(root: Path, *more: str, out: Path | None = None) -> dict:
    return stage("pretrain", *pretrain_keys(root / "data"), "trainer.max_steps=6", f"out={out or root / 'parent'}", *more)


def losses(run: Path) -> list[list[float]]:
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [[row["step"], row["loss"], *row.get("subnetwork_losses", [])] for row in rows if row["event"] == "train"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(run: Path, call: Callable[[], object], message: str) -> str:
    """Assert that `call` is refused with one line that matches `message`, and leaves `run` as it was."""
    before = contents(run)
    with pytest.raises(FlextronError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
    assert contents(run) == before
    return str(error.value)


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Context in which another process holds the lock of `out`."""
    code = "import pathlib, sys; from flextron_mcore.runtime.locks import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])): print('locked', flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(out)], **pipes) as other:
        assert other.stdout.readline() == "locked\n"
        yield
        other.communicate("\n")


def edit(file: Path, change: Callable[[dict], object]) -> None:
    """Apply `change` to a JSON file, and accept its new digest."""
    table = json.loads(file.read_text())
    change(table)
    file.write_text(json.dumps(table))
    accept(file)


# ---- the same run, or another ----


@pytest.mark.parametrize(
    "change, message",
    [
        ("trainer.max_steps=7", r"holds a run with trainer.max_steps=6, not 7: choose another out, or overwrite=true"),
        ("data_weights.code=2", r"holds a run with data_weights.code=null, not 2"),
        ("space.granularity=1", r"holds a run with space.granularity=null, not 1"),
        ("checkpoint={root}/parent", r"holds a run with checkpoint=.*/sorted, not .*/parent"),
    ],
)
def test_another_run_is_refused(tree, change, message):
    key = change.format(root=tree)
    refused(tree / "elastic", lambda: elastic(tree, f"+{key}" if key.startswith("data_weights.") else key), message)


def test_another_form_of_the_optimizer_is_refused(tree):
    """The distributed optimizer stores its state in another form, so a run cannot continue with it."""
    file = tree / "elastic" / "config.yaml"
    file.write_text(file.read_text().replace("use_distributed_optimizer: false", "use_distributed_optimizer: true"))
    accept(file)
    message = r"holds a run with model.ddp.use_distributed_optimizer=true, not false"
    refused(tree / "elastic", lambda: elastic(tree), message)


def test_other_data_under_the_same_path_are_refused(tree):
    file = tree / "data" / "code_train.bin"
    tokens = bytearray(file.read_bytes())
    tokens[100] ^= 1
    file.write_bytes(tokens)
    for run, train in (("parent", pretrain), ("elastic", elastic)):
        refused(tree / run, lambda train=train: train(tree), f"holds a run on other data than is now in data={tree}/data: choose")


def swap_tokens(folder: Path) -> None:
    def swap(table: dict) -> None:
        vocab = table["model"]["vocab"]
        first, second = list(vocab)[270:272]
        vocab[first], vocab[second] = vocab[second], vocab[first]

    edit(folder / "tokenizer.json", swap)


def test_another_tokenizer_under_the_same_path_is_refused(tree):
    swap_tokens(tree / "data" / "tokenizer")
    message = f"holds a run on data of another tokenizer than that of data={tree}/data: choose another out"
    refused(tree / "parent", lambda: pretrain(tree), message)


@pytest.mark.parametrize("name", ["elastic", "evaluate", "importance"])
def test_data_of_another_tokenizer_than_the_models_are_refused(tree, tmp_path, name):
    """The other tokenizer is of the same size, so only its tokens differ. A tokenizer file in another layout is the same."""
    keys = [f"checkpoint={tree}/sorted", f"data={tree}/data", f"out={tmp_path}/out"]
    folder = tree / "sorted" / "tokenizer"
    edit(folder / "tokenizer.json", lambda table: None)
    assert (folder / "tokenizer.json").read_bytes() != (tree / "data" / "tokenizer" / "tokenizer.json").read_bytes()
    if name == "evaluate":
        stage(name, *keys, "limit_val_batches=1")
        shutil.rmtree(tmp_path / "out")
    swap_tokens(folder)
    with pytest.raises(FlextronError, match=f"data={tree}/data: prepared with another tokenizer than the model's") as error:
        stage(name, *keys)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["space"].update(ffn_hidden_size=[32, 64]), r"checkpoint.space.ffn_hidden_size=\[16,.*\], not \[32,64\]"),
        (lambda d: d["model"].update(rotary_base=5e5), r"checkpoint.model.rotary_base=10000.0, not 500000.0"),
        (lambda d: d.update(sorted=False), r"checkpoint.sorted=true, not false"),
    ],
)
def test_another_source_under_the_same_path_is_refused(tree, change, message):
    edit(open_checkpoint(tree / "sorted").path / "flextron.json", change)
    refused(tree / "elastic", lambda: elastic(tree), f"holds a run with {message}: choose another out")


def test_keys_that_do_not_change_the_result_may_change(tree, chain):
    """A run continues with another layout, other paths, or changed start weights, and has the losses of the uninterrupted run."""
    moved = tree.with_name("moved")
    tree.rename(moved)
    source = open_checkpoint(moved / "sorted").path
    edit(source / "flextron.json", lambda d: d.update(step=99, dtype="bf16"))
    source.rename(source.with_name("iter_0000099"))
    config = (moved / "elastic" / "config.yaml").read_text()
    elastic(
        moved, "model.micro_batch_size=2", "model.ddp.overlap_grad_reduce=true", "exp_manager.create_tensorboard_logger=false"
    )
    found, expected = losses(moved / "elastic"), losses(chain / "elastic")
    assert found[:3] == expected[:3]
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-5)
    assert (moved / "elastic" / "config.yaml").read_text() == config


def test_a_run_moved_alone_continues_and_its_data_may_move(tree, tmp_path, chain):
    (tree / "elastic").rename(tmp_path / "other")
    (tree / "data").rename(tmp_path / "data")
    elastic(tree, f"checkpoint={chain}/sorted", f"data={tmp_path}/data", out=tmp_path / "other")
    assert losses(tmp_path / "other") == losses(chain / "elastic")


def test_a_run_without_a_checkpoint_starts_anew(tree):
    shutil.rmtree(tree / "elastic" / "checkpoints")
    edit(open_checkpoint(tree / "sorted").path / "flextron.json", lambda d: d["model"].update(rotary_base=5e5))
    elastic(tree)
    rows = [json.loads(line) for line in (tree / "elastic" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["event"] == "validation"] == [0, 4, 6]
    assert open_checkpoint(tree / "elastic").model.rotary_base == 5e5


def test_a_run_of_before_the_fingerprints_continues(tree, chain):
    file = tree / "elastic" / "config.yaml"
    values = yaml.safe_load(file.read_text())
    assert set(values.pop("fingerprints")) == {"data", "tokenizer"}
    values.update(data=f"{tree}/data")
    file.write_text(yaml.safe_dump(values))
    accept(file)
    shutil.copytree(tree / "data", tree / "copy")
    refused(tree / "elastic", lambda: elastic(tree, f"data={tree}/copy"), "holds a run with data=.*/data, not .*/copy")
    elastic(tree)
    assert losses(tree / "elastic") == losses(chain / "elastic")


@pytest.mark.parametrize("name", ["parent", "elastic"])
def test_a_run_killed_after_its_last_checkpoint_finishes(chain, tmp_path, name):
    """The run has no step left: its losses come from the log, or are computed again where the log has lost them."""
    keys = pretrain_keys(chain / "data") if name == "parent" else elastic_keys(chain)
    command = "pretrain" if name == "parent" else "elastic", *keys, "trainer.max_steps=6"
    finish_again(chain / name, tmp_path / "again", *command)
    run = tmp_path / "again"
    expected = json.loads((run / "metrics.json").read_text())["validation"]
    (run / "metrics.json").unlink()
    log = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(row for row in log if '"step": 6, "event": "validation"' not in row))
    assert stage(*command, f"out={run}")["validation"] == expected
    assert sum('"step": 6, "event": "validation"' in row for row in (run / "log.jsonl").read_text().splitlines()) == 1


# ---- damaged files ----


def test_a_damaged_checkpoint_is_named_and_the_older_continues(tree, chain):
    run = tree / "elastic"
    shutil.copytree(chain / "elastic" / "checkpoints" / "iter_0000006", run / "checkpoints" / "iter_0000006")
    newest = run / "checkpoints" / "iter_0000006"
    file = max(newest.iterdir(), key=lambda p: p.stat().st_size)
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(1024)
    message = f"{file.name} is truncated: 1024 bytes, not {size}; remove {newest} to continue from iter_0000003"
    refused(run, lambda: elastic(tree), message)
    shutil.rmtree(newest)
    elastic(tree)
    assert losses(run) == losses(chain / "elastic")


@pytest.mark.parametrize(
    "content",
    ["", "a: [", "a: {b: 1\n  c", "- 1\n- 2\n", "text", "\0\0\0\0", b"\xff\xfe\x00\xd8", "a: ${\n", "<<: 3\n"],
    ids=repr,
)
def test_a_damaged_configuration_is_named(tree, content):
    file = tree / "elastic" / "config.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = r"elastic/config.yaml: is damaged \(.*\): bring it back from a copy, choose another out, or overwrite=true"
    refused(tree / "elastic", lambda: elastic(tree), message)


@pytest.mark.parametrize("key", ["model", "stage", "seed"])
def test_half_a_configuration_is_damaged(tree, key):
    file = tree / "elastic" / "config.yaml"
    text = file.read_text()
    file.write_text(text[: f"\n{text}".index(f"\n{key}:")])
    refused(tree / "elastic", lambda: elastic(tree), r"elastic/config.yaml: is damaged \(not a configuration\)")


def test_a_damaged_log_loses_its_damaged_lines_only(tree):
    file = tree / "elastic" / "log.jsonl"
    first, second, third, *rest = [row for row in file.read_bytes().splitlines() if b'"train"' in row]
    damaged = [first, second[:20], b"\xff\x00", b"[1]", b'{"step": 2}', b"null", third, *rest[:1]]
    file.write_bytes(b"\n".join(damaged))
    elastic(tree)
    assert [row[0] for row in losses(tree / "elastic")] == [1, 3, 4, 5, 6]


def test_stray_files_among_the_checkpoints_are_left_alone(tree):
    folder = tree / "elastic" / "checkpoints"
    for name in ("latest_checkpointed_iteration.txt", "iter_0000009.bak", "iter_", "iter_0000100"):
        (folder / name).write_text("stray")
    (folder / "iter_x").mkdir()
    elastic(tree)
    found = {p.name for p in folder.iterdir()} - {p.name for p in list_checkpoints(tree / "elastic")}
    assert found == {"latest_checkpointed_iteration.txt", "iter_0000009.bak", "iter_", "iter_0000100", "iter_x"}


# ---- one process at a time, and disks ----


def test_a_run_that_is_being_written_is_left_alone(tree):
    message = r"process \d+ on \S+ is writing to it: wait for its end, or choose another out"
    with held(tree / "elastic"):
        refused(tree / "elastic", lambda: elastic(tree), message)
        refused(tree / "elastic", lambda: elastic(tree, "overwrite=true"), message)
    (tree / ".elastic.lock").write_text("process 1 on another-node")  # a killed process holds no lock
    elastic(tree)
    assert not (tree / ".elastic.lock").exists()


def test_overwrite_replaces_all_of_a_run(tree):
    run = tree / "elastic"
    (run / "stray").mkdir()
    (run / "stray" / "file").write_text("x")
    (run / "link").symlink_to(tree / "sorted")
    elastic(tree, "trainer.max_steps=2", "overwrite=true")
    assert [p.name for p in list_checkpoints(run)] == ["iter_0000002"]
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 2
    assert not (run / "stray").exists() and not (run / "link").exists() and open_checkpoint(tree / "sorted")


def test_overwrite_that_fails_before_the_new_run_is_there_changes_nothing(tree, monkeypatch):
    run = tree / "elastic"
    (run / "metrics.json").write_text("{}")
    before = contents(run)

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    for place in ("flextron_mcore.runs.resume.write_whole", "flextron_mcore.runtime.disk.publish"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(place, fail)
            elastic(tree, "overwrite=true")
        assert contents(run) == before
    elastic(tree, "trainer.max_steps=1", "overwrite=true")


def test_overwrite_that_is_killed_between_its_renames_loses_nothing(tree, chain):
    """The replaced run, `.elastic.old` between the renames, is put back, and removed only when the new run has its place."""
    run, old = tree / "elastic", tree / ".elastic.old"
    run.rename(old)
    elastic(tree)
    assert losses(run) == losses(chain / "elastic") and not old.exists()
    shutil.copytree(run, old)
    elastic(tree, "trainer.max_steps=1", "overwrite=true")
    assert not old.exists() and len(losses(run)) == 1


@pytest.mark.parametrize("content", ["file", "directory", "leftover"])
def test_out_that_exists_before_the_run(tree, tmp_path, content):
    out = tmp_path / "out"
    if content == "file":
        out.write_text("precious")
        with pytest.raises(FlextronError, match=f"out={out}: is a file"):
            elastic(tree, "overwrite=true", out=out)
        assert out.read_text() == "precious"
        return
    out.mkdir()
    if content == "directory":
        (out / "thesis.txt").write_text("precious")
        refused(out, lambda: elastic(tree, "overwrite=true", out=out), "was not written by flextron; choose another")
    else:  # left by a process killed before it wrote more
        (tmp_path / ".out.lock").write_text("process 1 on another-node")
        (tmp_path / ".out.tmp").mkdir()
        (tmp_path / ".out.tmp" / ".config.yaml.tmp").write_text("half")
        elastic(tree, "trainer.max_steps=1", out=out)
        assert not list(tmp_path.glob(".out*"))


def test_a_read_only_out(tree, make_disk):
    disk = make_disk("8m")
    shutil.copytree(tree / "elastic", disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for out in (disk / "run", disk / "new", disk / "new" / "deep"):
        refused(disk, lambda out=out: elastic(tree, out=out), rf"{out}: cannot be written: Read-only file system")


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_before_the_first_file(tree, make_disk, exists):
    disk = make_disk("1m")
    out = disk / "run"
    if exists:
        out.mkdir()
    with suppress(OSError), (disk / "ballast").open("wb") as file:
        while True:
            file.write(bytes(1 << 12))
            file.flush()
    refused(disk, lambda: elastic(tree, out=out), "cannot be written: No space left on device; nothing was changed")
    assert out.exists() == exists and not (exists and any(out.iterdir()))


def test_a_checkpoint_is_written_when_its_time_has_come(tree):
    """every_minutes writes a checkpoint before every_n_train_steps does, which changes no loss."""
    keep = "exp_manager.checkpoint_callback_params.keep_last=9"
    kept = {}
    for name, minutes in (("steps", "null"), ("minutes", "1e-9")):
        out = tree / name
        callback = "exp_manager.checkpoint_callback_params"
        pretrain(tree, keep, f"{callback}.every_n_train_steps=4", f"{callback}.every_minutes={minutes}", out=out)
        kept[name] = [open_checkpoint(folder).step for folder in list_checkpoints(out)]
    assert kept == {"steps": [4, 6], "minutes": [1, 2, 3, 4, 5, 6]}
    assert losses(tree / "steps") == losses(tree / "minutes")
