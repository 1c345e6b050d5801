"""Every command of the operator's guide runs as written; launches become dry runs (tests/slurm submits jobs)."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from flextron_mcore import cli
from flextron_mcore.launch import follow
from flextron_mcore.launch.plan import plan
from flextron_mcore.launch.search import lay_out
from tests.stages.conftest import stage

ROOT = Path(__file__).resolve().parents[2]
GUIDES = {"docs/operators.md": 8, "README.md": 3}  # number of launch and status commands in each page


def commands(file: str) -> list[list[str]]:
    """Arguments of the `flextron` commands in the code blocks of a page."""
    blocks = (ROOT / file).read_text().split("```")[1::2]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("flextron ")]
    found = [shlex.split(line, comments=True)[1:] for line in lines]
    return [words for words in found if words[0] in ("launch", "status") or file != "README.md"]


@pytest.fixture
def desk(text, tmp_path, monkeypatch) -> Iterator[Path]:
    """Working directory of an operator: a corpus, a tokenizer, and a record of launched jobs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(text / "code", "corpus/code")
    with gzip.open("corpus/web.jsonl.gz", "wt") as file:
        for i in range(400):
            file.write(json.dumps({"text": f"page {i} says what a page says when it is the {i}th of them"}) + "\n")
    stage("prepare", "input=corpus/code", "vocab_size=300", "out=bpe")
    shutil.copytree("bpe/tokenizer", "data/Llama-2-7b-hf")
    results, logs = Path("results/llama2_7b"), Path("logs")
    (results / "launch").mkdir(parents=True)
    logs.mkdir()
    (logs / "log-flextron.elastic_7_0.out").write_text("step 1\n")
    follow.write_record(results, [follow.Record("elastic", "elastic", "7", str(logs.absolute()), 80000)])
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "squeue").write_text("#!/bin/sh\necho '7|RUNNING|0:09|node1|None'\n")
    (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")  # /usr/bin and /bin have the shell that NeMo-Run starts
    with Path("/dev/null").open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        yield tmp_path


@pytest.mark.parametrize("file", GUIDES)
def test_every_command_of_the_guide_runs(desk, file, capsys):
    found = commands(file)
    assert len(found) == GUIDES[file], found
    for words in found:
        if words[0] == "launch" and "dry_run=true" not in words:
            words = [*words, "dry_run=true"]
        cli._main(words)
        out = capsys.readouterr().out
        if words[0] == "launch":
            assert "dry run: nothing was written or submitted" in out and "#SBATCH --account=A" in out
        if words[0] == "status":
            assert "running" in out or "step 1" in out
    assert (desk / "data" / "prepared" / "data.json").is_file() or file == "README.md"
    assert [path.name for path in (desk / "results").iterdir()] == ["llama2_7b"]
    assert [path.name for path in (desk / "results/llama2_7b/launch").iterdir()] == ["jobs.json"]


def answers() -> list[str]:
    """Keys in the column `type` of the table of keys in docs/operators.md."""
    table = (ROOT / "docs/operators.md").read_text().partition("| for | type |\n|---|---|\n")[2].partition("\n\n")[0]
    cells = [row.strip("|").rpartition("|")[2] for row in table.splitlines()]
    return [code for cell in cells for code in re.findall(r"`([^`]*)`", cell) if "=" in code]


ANSWERS = answers()


@pytest.mark.parametrize("keys", ANSWERS)
def test_every_answer_of_the_guide_is_accepted(desk, launch, keys, capsys):
    assert len(ANSWERS) >= 15
    stage("prepare", "input=corpus/code", "tokenizer=bpe/tokenizer", "out=data/prepared")
    LlamaConfig(num_hidden_layers=4, tie_word_embeddings=True).save_pretrained("data/Llama-2-7b-hf")
    typed = shlex.split(keys)
    model = [] if any(key.startswith("model=") for key in typed) else ["model=llama2/7b"]
    cli._main(["launch", "cluster=bcm", "cluster.account=A", *model, *typed, "dry_run=true"])
    out = capsys.readouterr().out
    assert "dry run: nothing was written or submitted" in out
    config = launch("cluster=bcm", "cluster.account=A", *model, *typed)
    planned, _ = lay_out(config, plan(config))
    jobs = {job.name: job for job in planned.jobs}
    for key, _, value in (word.partition("=") for word in typed):
        owner, _, path = key.partition(".")
        job = jobs.get({"training": "elastic"}.get(owner, owner))
        if job and not path.startswith("run."):
            place = job if path.startswith("cluster.") else job.settings
            get = lambda owner, name: owner[name] if isinstance(owner, dict) else getattr(owner, name)  # noqa: E731
            found, typed_value = reduce(get, path.split("."), place), yaml.safe_load(value.replace("5e-", "5.0e-"))
            assert found in (typed_value, str(Path(str(typed_value)).absolute()))
    if "wandb" in keys:
        assert jobs["elastic"].settings.exp_manager.create_wandb_logger


def test_a_dry_run_shows_scripts_and_figures(desk, capsys):
    cli._main(["launch", "cluster=bcm", "cluster.account=A", "model=llama2/7b", "dry_run=true", "container=data/x.sqsh"])
    out = capsys.readouterr().out
    assert out.count("#!/bin/bash") == 7 and out.count("#SBATCH --kill-on-invalid-dep=yes") == 7
    elastic = out.partition("# ---- elastic")[2].partition("# ---- latency")[0]
    assert "#SBATCH --nodes=4" in elastic and "--nproc-per-node=8" in elastic and "scontrol requeue" in elastic
    assert f"--container-image {desk}/data/x.sqsh" in elastic and f"{desk}/results/llama2_7b:{desk}/results/llama2_7b" in elastic
    row = next(line for line in out.splitlines() if re.search(r"│ elastic\s", line))
    assert "83.9 B" in row
    assert "not ready: container=data/x.sqsh: no such file" in out and "/tmp/tmp" not in elastic
