"""`prepare` killed at any moment and typed again: the files of an undisturbed run, with the finished shards taken over."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.data import shards, tokenizer
from tests.stages.conftest import stage

# Program that runs `prepare` and kills itself at a step that writes. Arguments: number of such steps before it, keys.
KILLED = """
import os, signal, sys
from flextron_mcore.data import shards, tokenizer
from tests.stages.conftest import stage
shards._BATCHES, tokenizer.BATCH, shards.BATCH = 2, 600, 600
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
left = int(sys.argv[1])
def counted(owner, name):
    step = getattr(owner, name)
    def run(*arguments):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*arguments)
    setattr(owner, name, run)
counted(tokenizer.Tokenizer, "encode_batch")
for name in ("add_index", "finalize"):
    counted(IndexedDatasetBuilder, name)
stage("prepare", *sys.argv[2:])
"""


def keys(corpus: Path, out: Path) -> list[str]:
    return [f"input=[{corpus}/a.jsonl,{corpus}/b.jsonl]", "vocab_size=300", "valid_fraction=0.1", f"out={out}"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    draw = random.Random(5)
    for name in "ab":
        rows = [" ".join(draw.choices(["model", "layer", "head", "router", "loss"], k=draw.randint(5, 40))) for _ in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {row}"}) + "\n" for row in rows))
    return tmp_path


def files(out: Path) -> dict[str, bytes]:
    """{path: content} of all files, without config.yaml and digests.json, which depend on the name of `out`."""
    found = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return {name: data for name, data in found.items() if name not in ("config.yaml", "digests.json")}


def test_a_killed_run_continues(corpus: Path, tmp_path: Path, capfd) -> None:
    """Killed at random steps of tokenizing and of joining shards, the result is that of one run with one shard."""
    stage("prepare", *keys(corpus, tmp_path / "whole"))
    out, again = tmp_path / "again", tmp_path / ".again.unfinished"
    draw = random.Random(7)
    ends, said = [], ""
    for steps in [*(draw.randint(3, 25) for _ in range(2)), 10**6]:
        done = subprocess.run([sys.executable, "-c", KILLED, str(steps), *keys(corpus, out)], capture_output=True, text=True)
        ends.append(done.returncode)
        said += done.stdout
        if done.returncode == 0:
            break
        assert not out.exists() and any(again.glob("*.idx"))
    assert ends == [-signal.SIGKILL] * (len(ends) - 1) + [0]
    assert len(ends) > 2
    assert "continuing, tokenizing" in said
    assert files(out) == files(tmp_path / "whole")
    assert not again.exists()


def test_shards_of_other_text_are_not_taken_over(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shards, "_BATCHES", 1)
    monkeypatch.setattr(tokenizer, "BATCH", 600)
    work = tmp_path / ".out.unfinished"
    encode, calls = tokenizer.Tokenizer.encode_batch, []

    def stopped(self, texts):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(tokenizer.Tokenizer, "encode_batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        stage("prepare", *keys(corpus, tmp_path / "out"))
    assert len(list(work.glob("*_valid.idx"))) == 4
    file = corpus / "b.jsonl"
    file.write_text(file.read_text().replace("router", "rooter", 1))
    stage("prepare", *keys(corpus, tmp_path / "out"))
    assert not work.exists()
    stage("prepare", *keys(corpus, tmp_path / "whole"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_directory_of_somebody_else_is_kept(corpus: Path, tmp_path: Path) -> None:
    mine = tmp_path / ".out.unfinished" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("three years")
    with pytest.raises(
        FlextronError, match=r"\.out\.unfinished: is not of an earlier `flextron prepare`, which keeps its unfinished"
    ):
        stage("prepare", *keys(corpus, tmp_path / "out"))
    assert mine.read_text() == "three years" and not (tmp_path / "out").exists()


def test_a_refusal_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    (corpus / "b.jsonl").write_text('{"text": 5}\n')
    before = sorted(tmp_path.iterdir())
    with pytest.raises(FlextronError, match="not a string"):
        stage("prepare", *keys(corpus, tmp_path / "out"))
    assert sorted(tmp_path.iterdir()) == before
