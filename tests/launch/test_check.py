"""Refusals of `flextron launch` on the login node: one line, before anything is written or submitted."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from flextron_mcore import cli
from flextron_mcore.config import FlextronError
from flextron_mcore.data.blend import open_data
from flextron_mcore.data.prepare import parse_inputs, prepare_data
from flextron_mcore.launch import follow
from flextron_mcore.launch.check import missing
from flextron_mcore.launch.plan import plan
from flextron_mcore.settings.compose import to_dict, to_yaml
from flextron_mcore.stages import launch as stage
from tests.hf_toy import llama, save


@pytest.fixture
def ready(tmp_path: Path, monkeypatch) -> Path:
    """Directory with all that a launch needs: a container image, and sbatch on the PATH."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, code in (("sbatch", 1), ("squeue", 0)):
        (tools / name).write_text(f"#!/bin/sh\nexit {code}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    (tmp_path / "image.sqsh").touch()
    return tmp_path


def problems(launch, tmp_path: Path, *arguments: str) -> list[str]:
    config = launch("cluster.account=a", "model=smoke", f"container={tmp_path}/image.sqsh", *arguments)
    found = missing(config, plan(config))
    assert all("\n" not in line for line in found)
    return found


def test_nothing_is_missing(launch, ready):
    assert problems(launch, ready) == []
    assert not (ready / "results").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["container=none.sqsh"], "container=none.sqsh: no such file"),
        (["container=null"], "container=null: jobs of this cluster run in containers"),
        (["base_results_dir=/proc/flextron"], "run.results_dir=/proc/flextron/smoke: cannot be written"),
        (["stages=[importance]"], "importance: needs the result of pretrain or import"),
        (["stages=[pretrain]", "data=nowhere"], "nowhere/data.json: cannot be read"),
        (["stages=[import]", "hf=nowhere"], "nowhere: no such directory"),
        (["stages=[import]"], "import: missing hf="),
        (["stages=[elastic]", "elastic.checkpoint=nowhere", "data=x"], "nowhere"),
    ],
)
def test_missing_inputs_are_named(launch, ready, monkeypatch, arguments, message):
    monkeypatch.chdir(ready)
    found = problems(launch, ready, *arguments)
    assert any(message in line for line in found), found


def test_an_image_of_a_registry_is_not_looked_for(launch, ready):
    assert problems(launch, ready, "container=nvcr.io#nvidia/pytorch:25.09-py3") == []


def test_without_slurm_there_is_a_line(launch, ready):
    (ready / "bin" / "sbatch").unlink()
    assert problems(launch, ready) == ["sbatch: not found: launch on a login node of the cluster, or with cluster=local"]


def test_without_nemo_run_there_is_a_line(launch, ready, monkeypatch):
    monkeypatch.setitem(sys.modules, "nemo_run", None)
    [line] = problems(launch, ready)
    assert re.fullmatch(r"NeMo-Run cannot be imported \(.*\): pip install 'flextron_mcore\[launch\]'", line)
    # Importing NeMo-Run takes seconds, so a launch that is refused anyway does not try. A dry run lists all that is missing.
    wrong = ["stages=[pretrain]", "data=nowhere"]
    assert [len(problems(launch, ready, *wrong, f"dry_run={dry}")) for dry in ("false", "true")] == [1, 2]


def test_another_model_is_not_taken_for_the_one_that_was_checked(launch, ready):
    save(llama(), ready / "hf")
    found = problems(launch, ready, "stages=[import]", f"hf={ready}/hf")
    assert len(found) == 1 and found[0].startswith(f"hf={ready}/hf: is another model than model= says"), found


def test_inputs_of_another_size_or_of_an_unfinished_stage_are_named(launch, ready):
    (ready / "text").write_text("some words of a text\n" * 50)
    (ready / "data").mkdir()
    prepare_data(parse_inputs(str(ready / "text")), ready / "data", vocab_size=300)
    found = problems(launch, ready, "stages=[pretrain]", f"data={ready}/data", "model.vocab_size=100")
    tokens = open_data(ready / "data").vocab_size
    assert found == [
        f"data={ready}/data: its tokenizer has {tokens} tokens, the model's vocabulary 100: prepare the text with the model's "
        "tokenizer"
    ]
    (ready / "elastic" / "checkpoints").mkdir(parents=True)
    [line] = problems(launch, ready, "stages=[latency]", f"latency.checkpoint={ready}/elastic")
    assert line.startswith(
        f"latency.checkpoint={ready}/elastic: its stage has not finished (it has no metrics.json): run the stage"
    )


def test_results_that_cannot_be_written_are_named(launch, ready, monkeypatch):
    monkeypatch.setattr(stage, "missing", lambda *args: [])
    (ready / "results" / "smoke").mkdir(parents=True)
    (ready / "results" / "smoke" / "launch").touch()
    with pytest.raises(FlextronError, match="smoke: cannot be written: File exists: set base_results_dir="):
        stage.run(launch("cluster=local", "model=smoke", "stages=[prepare]", "prepare.input=text", "gpus=1"))


def test_launch_refuses_before_it_writes(ready, tmp_path):
    arguments = ["launch", "cluster.account=a", "model=smoke", f"base_results_dir={tmp_path}/results", "container=none.sqsh"]
    with pytest.raises(FlextronError, match=r"container=none.sqsh: no such file"):
        cli._main(arguments)
    assert not (tmp_path / "results").exists()


def test_a_missing_account_is_a_missing_key(tmp_path):
    with pytest.raises(FlextronError, match=r"launch: missing cluster.account="):
        cli._main(["launch", "model=smoke", f"base_results_dir={tmp_path}/results"])


def test_a_stage_reads_what_launch_wrote(launch, tmp_path, monkeypatch):
    """--config FILE gives a stage exactly the keys in the file. Files of other stages or with unknown keys are refused."""
    job = plan(launch("cluster=local", "model=smoke")).jobs[3]
    file = tmp_path / "elastic.yaml"
    file.write_text(to_yaml(job.settings))
    seen = []
    monkeypatch.setattr(cli, "run_stage", seen.append)
    cli._main(["elastic", "--config", str(file)])
    assert json.dumps(to_dict(seen[0])) == json.dumps(to_dict(job.settings))
    for arguments, message in (
        (["router", "--config", str(file)], "is not a configuration of router"),
        (["elastic", "--config", str(tmp_path / "none.yaml")], "cannot be read"),
        (["elastic", f"--config={file}", "trainer.max_steps=3"], "holds all keys"),
    ):
        with pytest.raises(FlextronError, match=message):
            cli._main(arguments)
    file.write_text(file.read_text().replace("max_steps", "max_stepz"))
    with pytest.raises(FlextronError, match=r"elastic: unknown key 'trainer.max_stepz' \(did you mean 'trainer.max_steps'\?\)"):
        cli._main(["elastic", "--config", str(file)])


def test_a_local_chain_ends_at_the_first_failure(tmp_path, capfd, monkeypatch):
    """A real chain: prepare succeeds, pretrain fails with its line. Launched again, prepare is skipped."""
    # With these variables the jobs would join the process group of the tests.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    keys = [
        "launch",
        "cluster=local",
        "model=smoke",
        "gpus=1",
        f"base_results_dir={tmp_path}",
        "stages=[prepare,pretrain,importance]",
    ]
    keys += [f"prepare.input={Path(__file__).parent}", "pretrain.data_weights={nothing: 1}"]
    for complete in (False, True):
        with pytest.raises(SystemExit) as ended:
            cli.main(keys)
        out, err = capfd.readouterr()
        assert ended.value.code == 1
        assert ("prepare: complete in" in out) is complete
        lines = err.strip().splitlines()
        assert lines[-1] == (
            "flextron: failed: pretrain: ended with exit code 2; the stages after it were not run: correct the error above, "
            "then launch again"
        )
        assert any(line.startswith("flextron: error: ") and "data_weights" in line for line in lines)
    assert not (tmp_path / "smoke" / "importance").exists()


def test_a_logger_that_is_not_installed_is_missing(launch, ready, monkeypatch):
    """Jobs without a container have the packages of this environment."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    logged = ["stages=[pretrain]", "pretrain.exp_manager.create_wandb_logger=true", "dry_run=true", "data=nowhere"]
    found = problems(launch, ready, *logged, "cluster=slurm")
    assert any(line.startswith("pretrain: exp_manager.create_wandb_logger=true: wandb is not installed: ") for line in found)
    assert not any("wandb" in line for line in problems(launch, ready, *logged, "cluster=bcm"))


def test_nothing_is_replaced_while_jobs_run(ready):
    """Configuration files are not replaced while a job is queued: a job that is queued again reads its file again."""
    results = ready / "results" / "smoke"
    (results / "launch").mkdir(parents=True)
    follow.write_record(results, [follow.Record("prepare", "prepare", "7", str(ready), None)])
    (ready / "bin" / "squeue").write_text("#!/bin/sh\necho '7|PENDING|0:00||Resources'\n")
    (ready / "bin" / "squeue").chmod(0o755)
    arguments = [
        "launch",
        "cluster.account=a",
        "model=smoke",
        f"base_results_dir={ready}/results",
        f"container={ready}/image.sqsh",
    ]
    with pytest.raises(FlextronError, match="prepare: job 7 of an earlier launch is pending"):
        cli._main(arguments)
    assert [path.name for path in (results / "launch").iterdir()] == ["jobs.json"]


def test_a_refused_launch_leaves_nothing(launch, ready, monkeypatch):
    """A refused launch leaves neither results/NAME/launch nor job files."""
    monkeypatch.setattr(stage, "missing", lambda *args: [])
    with pytest.raises(FlextronError, match="pretrain: trainer.num_nodes=2: cluster=local is one machine"):
        stage.run(launch("cluster=local", "model=smoke", "stages=[pretrain]", "pretrain.trainer.num_nodes=2"))
    assert not (ready / "results").exists()

    def refuse(*args):
        assert (ready / "results" / "smoke" / "launch" / "prepare.yaml").is_file()
        raise FlextronError("sbatch refused a job: invalid account")

    monkeypatch.setattr(stage.slurm, "submit", refuse)
    config = launch("cluster.account=a", "model=smoke", "stages=[prepare]", "prepare.input=text", f"container={ready}/image.sqsh")
    with pytest.raises(FlextronError, match="sbatch refused"):
        stage.run(config)
    assert not (ready / "results").exists()


def test_a_job_does_not_write_over_its_input(launch, ready):
    config = launch("cluster.account=a", "model=smoke", f"hf={ready}/results/smoke", "stages=[import]")
    with pytest.raises(FlextronError, match="out=.*/results/smoke/import: lies inside the input hf="):
        stage.run(config)
