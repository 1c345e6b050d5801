"""`prepare` with several processes: the files of one process, whatever ends them."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.data import shards, tokenizer, writers
from flextron_mcore.data.prepare import prepare_data
from tests import tokenizer_kinds

SMALL = 600  # characters of a batch in these tests

# Program that tokenizes with two processes in small shards. After the first shard it prints the ids of its processes and kills
# itself. Arguments: corpus, out, work.
PROGRAM = f"""
import os, signal, sys
from pathlib import Path
import psutil
from flextron_mcore.data import shards, tokenizer, writers
from flextron_mcore.data.prepare import prepare_data
collect = writers.Processes._collect
def killing(self):
    collect(self)
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    writers.Processes._collect = killing
    shards._BATCHES, tokenizer.BATCH, shards.BATCH = 2, {SMALL}, {SMALL}
    corpus, out, work = map(Path, sys.argv[1:])
    out.mkdir()
    prepare_data({{"a": [corpus]}}, out, vocab_size=300, workers=2, work=work)
"""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch) -> Path:
    """File of 200 short texts, of which a shard has about 50."""
    monkeypatch.setattr(shards, "_BATCHES", 2)
    monkeypatch.setattr(tokenizer, "BATCH", SMALL)
    monkeypatch.setattr(shards, "BATCH", SMALL)
    draw = random.Random(5)
    rows = [" ".join(draw.choices(["model", "layer", "head", "router"], k=draw.randint(5, 40))) for _ in range(200)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return file


def made(corpus: Path, out: Path, **options: object) -> dict[str, bytes]:
    """{name: content} of the files that `prepare_data` writes for one domain, with a tokenizer of 300 tokens unless given."""
    out.mkdir()
    prepare_data({"a": [corpus]}, out, vocab_size=300, **options)
    return {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_processes_write_the_same_files(corpus: Path, tmp_path: Path) -> None:
    assert made(corpus, tmp_path / "two", workers=2) == made(corpus, tmp_path / "one")


@pytest.mark.parametrize("kind", ["gpt2", "smollm", "llama2", "llama3", "qwen"])
def test_a_process_opens_the_same_tokenizer(kind: str, tmp_path: Path) -> None:
    """Every kind of tokenizer, saved and opened again as a process does, has the same state, however it reads special tokens."""
    tokenizer_kinds.save(getattr(tokenizer_kinds, kind)(), tmp_path / "given")
    for number, chosen in enumerate([(None, None), (True, True), (False, False)]):
        opened = tokenizer.open_tokenizer(tmp_path / "given", *chosen)
        opened.save(tmp_path / f"{number}")
        assert tokenizer.open_tokenizer(tmp_path / f"{number}", *chosen).state() == opened.state()
    kept, parsed = (tokenizer.open_tokenizer(tmp_path / "given", None, value).state() for value in (False, True))
    assert kept != parsed


def test_another_tokenizer_is_refused(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(tokenizer.Tokenizer, "state", lambda self: str(id(self)))
    with pytest.raises(FlextronError, match="opens as another tokenizer than the one it was saved from"):
        made(corpus, tmp_path / "out", workers=2)


def test_a_killed_process_is_one_line(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    submit = writers.Processes.write
    others = set(multiprocessing.active_children())  # left by libraries of other tests

    def ours() -> set[multiprocessing.process.BaseProcess]:
        return set(multiprocessing.active_children()) - others

    def killing(self, *arguments) -> None:
        submit(self, *arguments)
        for child in list(ours())[:1]:
            child.kill()

    monkeypatch.setattr(writers.Processes, "write", killing)
    with pytest.raises(FlextronError, match="one of 2 processes that tokenize was killed.* with fewer workers"):
        made(corpus, tmp_path / "out", workers=2, work=tmp_path / "work")
    monkeypatch.undo()
    assert not ours()


def test_a_killed_command_leaves_no_process(corpus: Path, tmp_path: Path, capsys) -> None:
    """Processes end with the command, and one process takes their shards over. The files are those of one undisturbed process."""
    out, work = tmp_path / "killed", tmp_path / "work"
    with (tmp_path / "printed").open("w") as printed:  # no pipe, which processes that are left would keep open
        program = subprocess.run([sys.executable, "-c", PROGRAM, corpus, out, work], stdout=printed, timeout=300)
    assert program.returncode == -signal.SIGKILL
    children = [int(pid) for pid in (tmp_path / "printed").read_text().splitlines()[-1].split()]
    assert len(children) >= 2
    end = time.monotonic() + 30
    while any(map(psutil.pid_exists, children)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [pid for pid in children if psutil.pid_exists(pid)]
    assert made(corpus, tmp_path / "again", work=work) == made(corpus, tmp_path / "one")
    assert "continuing, tokenizing" in capsys.readouterr().out
