"""Scripts and submission, with stand-ins for Slurm's programs; tests/slurm has the real ones."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flextron_mcore import cli
from flextron_mcore.config import FlextronError
from flextron_mcore.launch import follow, slurm
from flextron_mcore.launch.plan import plan
from flextron_mcore.launch.texts import check_texts
from flextron_mcore.settings.launch import LaunchSettings
from flextron_mcore.settings.schema import checked

SBATCH = r"""#!/bin/bash
# Records arguments and the script; refuses the job when the file `refuse` holds as many words as jobs were taken.
number=$(ls "$FAKE" | grep -c '^arguments')
if [ "$number" = "$(cat "$FAKE/refuse" 2>/dev/null)" ]; then
    echo "sbatch: error: Batch job submission failed: Invalid account" >&2
    echo "details that nobody needs" >&2
    exit 1
fi
printf '%s\n' "$@" > "$FAKE/arguments$number"
cp "${@: -1}" "$FAKE/script$number"
env > "$FAKE/environment$number"
echo $((70 + number))
"""
# srun records arguments and environment, and runs the command that starts a rank on each node, with a stand-in for python.
SRUN = f"""#!{sys.executable}
import json, os, sys
words = sys.argv[1:]
if "hostname" in " ".join(words[:7]):
    print("127.0.1.1 10.0.0.7")
    sys.exit()
with open(os.environ["FAKE"] + "/srun.json", "w") as file:
    json.dump([words, dict(os.environ)], file)
start = next(i for i, word in enumerate(words) if word == "python" or words[i : i + 2] == ["bash", "-c"])
os.environ["SLURM_NODEID"] = "0"
os.execvp(words[start], words[start:])
"""
PYTHON = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["FAKE"] + "/python.json", "w") as file:
    json.dump(sys.argv[1:], file)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch) -> Path:
    """Directory of the records of stand-ins for Slurm's programs, which are on the PATH."""
    folder, tools = tmp_path / "fake", tmp_path / "tools"
    folder.mkdir()
    tools.mkdir()
    programs = {"sbatch": SBATCH, "srun": SRUN, "python": PYTHON, "squeue": "#!/bin/sh\n"}
    programs |= {"scancel": '#!/bin/sh\necho "$@" > "$FAKE/cancelled"\n', "scontrol": "#!/bin/sh\necho node1\n"}
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("FAKE", str(folder))
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return folder


def smoke(tmp_path: Path, *more: str) -> list[str]:
    """Arguments of a launch of the smoke model that this machine's files allow."""
    keys = ["launch", "cluster=slurm", "cluster.account=a", "model=smoke", f"base_results_dir={tmp_path}/results"]
    return [*keys, "stages=[prepare,pretrain,importance]", *more]


def printed_scripts(out: str) -> list[str]:
    """Scripts in the output of a dry run."""
    return [part.partition("\n")[2] for part in out.partition("estimates;")[0].split("# ---- ")[1:]]


def test_a_dry_run_prints_what_is_submitted(fake, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SBATCH_ACCOUNT", "another")  # sbatch prefers it to the script's #SBATCH line
    monkeypatch.setenv("SLURM_TIME_FORMAT", "standard")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    odd = "env_vars={lower_Case: 'a b;$(id)', QUOTE: \"it's\"}"
    cli._main([*smoke(tmp_path, odd), "dry_run=true"])
    printed = printed_scripts(capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fake", "tools"] and not list(fake.iterdir())
    cli._main(smoke(tmp_path, odd))
    submitted = [(fake / f"script{i}").read_text() for i in range(3)]
    assert [text.rstrip("\n") for text in printed] == [text.rstrip("\n") for text in submitted] and len(printed) == 3
    assert "export lower_Case='a b;$(id)'\n" in submitted[0]
    arguments = [(fake / f"arguments{i}").read_text().splitlines() for i in range(3)]
    assert [each[:-1] for each in arguments] == [
        ["--requeue", "--parsable"],
        ["--requeue", "--parsable", "--dependency=afterok:70"],
        ["--requeue", "--parsable", "--dependency=afterok:71"],
    ]
    environment = (fake / "environment0").read_text()
    assert "SBATCH_ACCOUNT" not in environment and "SLURM_TIME_FORMAT" in environment
    records = follow.read_record(tmp_path / "results" / "smoke")
    assert [(record.name, record.id) for record in records] == [("prepare", "70"), ("pretrain", "71"), ("importance", "72")]
    assert [Path(record.logs).joinpath(f"{record.name}_sbatch.sh").read_text() for record in records] == submitted
    assert not (tmp_path / "home").exists()


def test_a_launch_within_a_job_does_not_hand_on_its_sizes(fake, tmp_path, monkeypatch):
    """Jobs must not inherit SLURM_MEM_PER_CPU and the like of the launching job: srun refuses several of them together."""
    outer = {"SLURM_JOB_ID": "3", "SLURM_MEM_PER_CPU": "50", "SLURM_RESTART_COUNT": "2", "SLURM_CONF": "/etc/slurm.conf"}
    for name, value in outer.items():
        monkeypatch.setenv(name, value)
    cli._main(smoke(tmp_path))
    seen = (fake / "environment0").read_text().splitlines()
    assert [line for line in seen if line.startswith("SLURM_")] == ["SLURM_CONF=/etc/slurm.conf"]


ODD = {
    "A": "true",
    "B": "007",
    "C": "1e3",
    "D": "0x10",
    "E": "12:30:00",
    "F": ".5",
    "G": "1_000",
    "h": "a=b,c d",
    "I": "x${HOME}",
}


def test_environment_variables_are_the_typed_texts(fake, tmp_path, launch):
    """A mapping and single keys are taken as typed; a variable that is null is left out."""
    words = ", ".join(f"{name}: {json.dumps(value) if set(',{') & set(value) else value}" for name, value in ODD.items())
    for typed in ([f"env_vars={{{words}, N: null}}"], [f"env_vars.{name}={value}" for name, value in ODD.items()]):
        config = launch(*BCM, *typed)
        assert {name: value for name, value in config.env_vars.items() if value is not None} == ODD
    ((_, script),) = slurm.scripts(config, plan(config), {"pretrain": tmp_path / "pretrain.yaml"})
    _, environment, _ = run_script(script, fake)
    assert {name: environment[name] for name in ODD} == ODD
    assert launch(*BCM, "env_vars={A:b,C:1}").env_vars == {"A": "b", "C": "1"}  # without spaces, as Hydra accepts


def test_a_list_of_an_option_is_one_value(launch, tmp_path):
    keys = ["cluster=slurm", "cluster.account=a", "model=smoke", "stages=[pretrain]"]
    config = launch(*keys, "cluster.additional_parameters={exclude: [node1,node2]}")
    ((_, script),) = slurm.scripts(config, plan(config), {"pretrain": tmp_path / "pretrain.yaml"})
    assert "#SBATCH --exclude=node1,node2\n" in script


def test_a_refused_job_cancels_those_before_it(fake, tmp_path):
    (fake / "refuse").write_text("2")
    with pytest.raises(
        FlextronError, match=r"^sbatch refused a job: sbatch: error: .* Invalid account: correct the key of cluster$"
    ):
        cli._main(smoke(tmp_path))
    assert (fake / "cancelled").read_text() == "70 71\n"
    assert not (tmp_path / "results").exists()


def test_each_job_is_recorded_before_the_next_is_submitted(fake, tmp_path, launch):
    planned = plan(launch(*smoke(tmp_path)[1:]))
    seen: list[list[str]] = []
    slurm.submit(planned, [tmp_path / "tools" / "python"] * 3, lambda jobs: seen.append([job.id for job in jobs]))
    assert seen == [["70"], ["70", "71"], ["70", "71", "72"]]


def test_a_job_that_was_not_recorded_is_found_at_slurm(fake, tmp_path):
    """A launch that is killed between sbatch and its record leaves a job that the next one must see."""
    script = tmp_path / "results" / "smoke" / "launch" / "jobs" / "prepare" / "prepare_sbatch.sh"
    squeue = tmp_path / "tools" / "squeue"
    squeue.write_text(f"#!/bin/sh\necho '68|RUNNING|/elsewhere/x.sh'\necho '69|PENDING|{script}'\n")
    with pytest.raises(FlextronError, match="^job 69 of an earlier launch is pending: .* `scancel 69`"):
        cli._main(smoke(tmp_path))
    assert not (tmp_path / "results").exists() and not list(fake.glob("script*"))


BCM = ["cluster=bcm", "cluster.account=a", "model=smoke", "stages=[pretrain]", "container=/i.sqsh", "data=/data"]
BASE: dict[Path, LaunchSettings] = {}  # {tmp_path of a test: settings that its Hypothesis examples copy and change}


def _owner(config: LaunchSettings, key: str) -> tuple[Any, str]:
    *sections, name = key.split(".")
    return functools.reduce(getattr, sections, config), name


def run_script(script: str, folder: Path) -> tuple[list[str], dict[str, str], list[str]]:
    """Arguments and environment of srun, and arguments of python, when bash runs a script."""
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert checked.returncode == 0 and not checked.stderr, checked.stderr
    for name in ("srun.json", "python.json"):
        (folder / name).unlink(missing_ok=True)
    environment = {**os.environ, "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}
    done = subprocess.run(["bash", "-s"], input=script, text=True, capture_output=True, check=False, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    words, found = json.loads((folder / "srun.json").read_text())
    return words, found, json.loads((folder / "python.json").read_text())


def options(words: list[str]) -> dict[str, str]:
    return {word: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}


NASTY = st.text(st.sampled_from(string.printable + "é\u2028\x00\x7f\u00a0"), max_size=12) | st.sampled_from(
    [
        "a;touch X;b",
        "$(touch X)",
        "`touch X`",
        "a\ntouch X",
        "'; touch X; '",
        '"; touch X; "',
        "a b",
        "-x",
        "--",
        "${HOME}",
        "*",
        "~",
        "#",
    ]
    + ["a\\", "%j", "a:b", "a,b", "..", "\x00", "/nemo_run/a", "$head_node_ip", "é", "\\n", "!x", "{a,b}", "<x", ">X", "|touch X"]
)
KEYS = ["run.name", "base_results_dir", "cluster.account", "cluster.partition", "cluster.qos", "cluster.gres", "cluster.mem"]
KEYS += ["cluster.nodelist", "cluster.job_name_prefix", "cluster.srun_args", "cluster.additional_parameters.comment", "container"]
KEYS += ["env_vars.VALUE", "container_mounts", "data", "run.results_dir", "env_vars", "cluster.additional_parameters"]


@pytest.mark.parametrize("key", KEYS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(text=NASTY)
def test_nasty_texts_are_refused_or_handed_on_as_they_are(fake, tmp_path, launch, key, text):
    """For every text that a key may hold: one line of refusal, or exactly these bytes as arguments and environment."""
    if tmp_path not in BASE:
        BASE[tmp_path] = launch(*BCM)
    prefix = f"{tmp_path}/{key}/" if key in ("base_results_dir", "run.results_dir", "data") else ""
    try:
        if key in ("run.name", "base_results_dir", "run.results_dir"):  # other keys are interpolated from these
            config = launch(*BCM, f"{key}={prefix}{text}")
        else:
            config = copy.deepcopy(BASE[tmp_path])
        if key in ("env_vars", "cluster.additional_parameters"):  # the text is the name of an entry
            (config.env_vars if key == "env_vars" else config.cluster.additional_parameters)[text] = "value"
        elif key in ("cluster.srun_args", "container_mounts"):
            *sections, name = key.split(".")
            setattr(config.cluster if sections else config, name, [text])
        elif key == "cluster.additional_parameters.comment":
            config.cluster.additional_parameters["comment"] = text
        elif key == "env_vars.VALUE":
            config.env_vars["VALUE"] = text
        elif key not in ("run.name", "base_results_dir", "run.results_dir"):
            setattr(*_owner(config, key), f"{prefix}{text}")
        checked(config, "launch")
        planned = plan(config)
        check_texts(config, planned)
        configs = {job.name: planned.results / "launch" / f"{job.name}.yaml" for job in planned.jobs}
        ((_, script),) = slurm.scripts(config, planned, configs)
    except FlextronError as error:
        assert str(error) and len(" ".join(str(error).split()).splitlines()) == 1
        return
    words, environment, python = run_script(script, fake)
    assert not {path.name for path in fake.iterdir()} - {"srun.json", "python.json"}, script
    given_to = options(words)
    folder = planned.results / "launch" / "jobs" / "pretrain"
    assert given_to["--output"] == f"{folder}/log-pretrain_%j_0.out"
    mounts = given_to["--container-mounts"]
    as_they_are = [source for source, target in (mount.split(":")[:2] for mount in mounts.split(",")) if source == target]
    assert any(planned.results.is_relative_to(source) for source in as_they_are)  # data=.. may mount a parent of it
    assert f"{folder}:/nemo_run" in mounts
    assert python[:3] == ["-m", "torch.distributed.run", "--rdzv-conf"] and python[3] == "is_host=1"
    assert "--rdzv-endpoint=10.0.0.7:" in " ".join(python) and "--rdzv-id=7" in python
    assert python[-5:] == ["-m", "flextron_mcore", "pretrain", "--config", str(configs["pretrain"])]
    for name, value in config.env_vars.items():
        assert environment[name] == value and name in given_to["--container-env"].split(",")
    for word in [*config.cluster.srun_args]:
        assert word in words
    for mount in config.container_mounts:
        assert mounts.split(",").count(mount) >= 1
    assert given_to["--container-image"] in (config.container, os.path.abspath(config.container))
    flags = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    parsed = dict(word.split("=", 1) for line in flags for word in shlex.split(line) if "=" in word)
    assert all(len(shlex.split(line)) == 1 for line in flags), flags
    assert parsed["--account"] == config.cluster.account and parsed["--job-name"].endswith(f"pretrain.{config.run.name}")
    if "comment" in config.cluster.additional_parameters and config.cluster.additional_parameters["comment"] is not None:
        assert parsed["--comment"] == str(config.cluster.additional_parameters["comment"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run.name=a;touch X;b"], "launch: run.name=a;touch X;b: write it as letters, digits and any of . _ -"),
        (["run.name=.."], "launch: run.name=..: write it as letters"),
        (["cluster.account=$(id)"], r"launch: cluster.account=$(id): write it as letters"),
        (["cluster.setup=echo 'open"], 'cluster.setup="echo \'open": bash cannot read it'),
        (["cluster.setup=cat <<X"], "cluster.setup='cat <<X': bash cannot read it"),
        (["env_vars.A-B=1"], "env_vars.A-B: is not the name of a variable"),
        (["env_vars.UID=1"], "env_vars.UID: the batch script's shell sets this variable itself"),
        (["env_vars.A=a\nb"], r"env_vars.A='a\nb': holds '\n'"),
        (["cluster.additional_parameters={output: x}"], "cluster.additional_parameters.output: launch sets this option"),
        (["cluster.additional_parameters={'a b': x}"], "cluster.additional_parameters.a b: is not an option of sbatch"),
        (["cluster.additional_parameters={x: {a: b}}"], "cluster.additional_parameters.x={a: b}: is a mapping: write the option"),
        (["env_vars={watcher: 1}"], "env_vars.watcher: the batch script's shell sets this variable itself: leave it out"),
        (["base_results_dir=/a%j"], "run.results_dir=/a%j/smoke: holds one of % \\"),
        (["base_results_dir=/a:b", "cluster=bcm"], "run.results_dir=/a:b/smoke: holds one of : ,"),
        (["container_mounts=[/a]", "cluster=bcm"], "container_mounts=/a: is not a mount: write HOST:CONTAINER"),
        (["base_results_dir=/a/nemo_runs"], "run.results_dir=/a/nemo_runs/smoke: NeMo-Run takes /nemo_run"),
    ],
)
def test_texts_that_are_refused(fake, tmp_path, arguments, message):
    for more in ([], ["dry_run=true"]):
        with pytest.raises(FlextronError, match=re.escape(message)):
            cli._main([*smoke(tmp_path), *arguments, *more])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["fake", "tools"] and not list(fake.iterdir())


def test_shell_code_of_the_user_runs_before_the_command(fake, tmp_path, launch):
    config = launch("cluster=bcm", "cluster.account=a", "model=smoke", "stages=[prepare]", "cluster.setup=export A=$((1 + 1)) \\")
    planned = plan(config)
    check_texts(config, planned)
    ((_, script),) = slurm.scripts(config, planned, {"prepare": tmp_path / "prepare.yaml"})
    _, environment, python = run_script(script, fake)
    assert environment["A"] == "2" and python == ["-m", "flextron_mcore", "prepare", "--config", f"{tmp_path}/prepare.yaml"]


def test_a_stage_has_cluster_keys_of_its_own(fake, tmp_path, launch):
    """Stages of one process need no whole node of GPUs."""
    keys = ["import.cluster.partition=cpu", "import.cluster.exclusive=false", "import.cluster.gpus_per_node=null"]
    keys += [
        "import.cluster.cpus_per_task=4",
        "import.cluster.mem=64G",
        "cluster.qos=high",
        "import.cluster.container_writable=true",
    ]
    config = launch("cluster=bcm", "cluster.account=a", "model=llama2/7b", "stages=[import,elastic]", *keys)
    planned = plan(config)
    one, other = (text for _, text in slurm.scripts(config, planned, {job.name: tmp_path for job in planned.jobs}))
    of = lambda script: {line.split()[1] for line in script.splitlines() if line.startswith("#SBATCH")}  # noqa: E731
    assert of(one) - of(other) >= {"--partition=cpu", "--cpus-per-task=4", "--mem=64G", "--job-name=import.llama2_7b"}
    assert of(other) - of(one) >= {"--exclusive", "--gpus-per-node=8", "--mem=0"} and "--qos=high" in of(one) & of(other)
    assert "--container-writable" in one and "--cpus-per-task=4" in one.partition("srun --output")[2]
    assert "--container-writable" not in other and "--cpus-per-task" not in other


def test_jobs_see_what_they_read(tmp_path, launch, monkeypatch):
    """A job starts elsewhere, so relative paths become absolute; a container mounts each of them, and corpora that data name."""
    monkeypatch.chdir(tmp_path)
    here, bcm = Path.cwd(), ["cluster=bcm", "cluster.account=a", "model=smoke", "stages=[prepare,pretrain]"]
    (here / "known").mkdir()
    entry = {"train": "/d/corpora/web_text_document", "valid": None}
    (here / "known" / "data.json").write_text(json.dumps({"domains": {"web": entry, "own": {"train": "own", "valid": "v"}}}))
    for keys, expected in (
        (["prepare.input=[a,/b/c.txt]", "prepare.tokenizer=t"], {here / "a", Path("/b/c.txt"), here / "t"}),
        (["prepare.input={x: a, y: [b]}"], {here / "a", here / "b"}),
        (["prepare.paths=[0.7,c/web,0.3,/d/code]", "prepare.tokenizer=t"], {here / "c", Path("/d"), here / "t"}),
        (["pretrain.data=known"], {here / "known", Path("/d/corpora")}),
    ):
        planned = plan(config := launch(*bcm, *keys))
        assert {Path(mount.partition(":")[0]) for mount in slurm.mounts(config, planned)} == {planned.results, *expected}
    jobs = {job.name: job.settings for job in plan(launch(*bcm, "prepare.input=[a,b]", "pretrain.data=known")).jobs}
    assert jobs["prepare"].input == [f"{here}/a", f"{here}/b"] and jobs["pretrain"].data == f"{here}/known"
    assert plan(launch(*bcm)).jobs[0].settings.input == "builtin"


def test_exports_are_one_job(fake, tmp_path, launch):
    """A job that is queued again skips complete exports, and a failure ends it."""
    keys = ["cluster=slurm", "cluster.account=a", "model=smoke", "stages=[pretrain,export]", "budgets=[0.4,25ms,2GiB]"]
    planned = plan(launch(*keys, f"base_results_dir={tmp_path}/re sults"))
    names = ["export_0.4", "export_25ms", "export_2GiB"]
    configs = {name: tmp_path / f"{name} '.yaml" for name in ["pretrain", *names]}
    (first, _), (name, script) = slurm.scripts(launch(*keys), planned, configs)
    assert (first, name) == ("pretrain", "export") and "#SBATCH --job-name=export.smoke\n" in script
    files = [tmp_path / f"{batch.name}.sh" for batch in slurm.batches(planned)]
    jobs = slurm.submit(planned, files, lambda jobs: None)
    assert [(job.name, job.id) for job in jobs] == [("pretrain", "70"), *((name, "71") for name in names)]
    assert len({job.folder for job in jobs[1:]}) == 1
    done = planned.results / "export_0.4" / "metrics.json"
    done.parent.mkdir(parents=True)
    done.touch()
    (srun,) = [line for line in script.splitlines() if line.startswith("srun ")]
    seen = tmp_path / "seen"
    (tmp_path / "tools" / "srun").write_text('#!/bin/sh\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n')
    for code, count in ((0, 2), (3, 1)):
        python = tmp_path / f"python{code}"
        python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$5" >> {seen}\nexit {code}\n')
        python.chmod(0o755)
        command = srun.replace(sys.executable, str(python))
        assert subprocess.run(["bash", "-c", command], check=False, env={"PATH": f"{tmp_path}/tools:/bin"}).returncode == code
        assert seen.read_text().splitlines() == [str(configs[name]) for name in names[1 : 1 + count]]
        seen.unlink()


def test_ranks_are_bound_to_cpus(fake, tmp_path, launch):
    keys = ["cluster=slurm", "cluster.account=a", "model=smoke", "stages=[pretrain]"]
    configs = {"pretrain": tmp_path / "pretrain.yaml"}
    (_, bare), (_, bound) = (
        slurm.scripts(config := launch(*keys, *more), plan(config), configs)[0] for more in ([], ["cluster.numa_binding=node"])
    )
    assert "--numa-binding" not in bare and " --numa-binding=node " in bound


def test_a_job_with_less_time_than_it_was_to_save_trains_for_half_of_it(fake, tmp_path, launch, monkeypatch):
    """An administrator may lower the time limit of a job."""
    config = launch(*BCM, "run.stop_before=00:03:20")
    ((_, script),) = slurm.scripts(config, plan(config), {"pretrain": tmp_path / "pretrain.yaml"})
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end := int(time.time()) + 100))
    _, environment, _ = run_script(script, fake)
    assert 40 <= end - int(environment["FLEXTRON_STOP_AT"]) <= 50 and environment["FLEXTRON_JOB_END"] == str(end)


@pytest.mark.parametrize("given", ["variable", "squeue", "neither"])
def test_training_stops_before_the_end_of_its_job(fake, tmp_path, launch, monkeypatch, given):
    """The end comes from Slurm, not from the start of the process, which an image that is pulled slowly delays."""
    config = launch(*BCM, "run.stop_before=00:03:20")
    planned = plan(config)
    ((_, script),) = slurm.scripts(config, planned, {"pretrain": tmp_path / "pretrain.yaml"})
    if given == "variable":
        monkeypatch.setenv("SLURM_JOB_END_TIME", "4000000200")
    else:
        said = "2096-10-02T07:10:00" if given == "squeue" else "N/A"
        monkeypatch.setenv("TZ", "UTC")
        (tmp_path / "tools" / "squeue").write_text(f"#!/bin/sh\necho {said}\n")
    _, environment, _ = run_script(script, fake)
    assert environment.get("FLEXTRON_STOP_AT") == (None if given == "neither" else "4000000000")
    assert environment.get("FLEXTRON_JOB_END") == (None if given == "neither" else "4000000200")


def test_secrets_are_not_printed(fake, tmp_path, launch):
    """NeMo-Run's script prints each line and command; values of environment variables must not reach the log."""
    config = launch("cluster=bcm", "cluster.account=a", "model=smoke", "stages=[prepare]", "env_vars={WANDB_API_KEY: hidden}")
    planned = plan(config)
    ((_, script),) = slurm.scripts(config, planned, {"prepare": tmp_path / "prepare.yaml"})
    file = tmp_path / "script.sh"
    file.write_text(script)
    environment = {**os.environ, "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}
    done = subprocess.run(["bash", str(file)], text=True, capture_output=True, check=True, env=environment)
    assert json.loads((fake / "srun.json").read_text())[1]["WANDB_API_KEY"] == "hidden"
    assert "hidden" not in done.stdout + done.stderr


SHELLCHECK = shutil.which("shellcheck")


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
def test_scripts_pass_shellcheck(fake, tmp_path, launch):
    planned = plan(config := launch("cluster=bcm", "cluster.account=a", "model=smoke", "stages=[pretrain]"))
    ((_, script),) = slurm.scripts(config, planned, {"pretrain": tmp_path / "pretrain.yaml"})
    # NeMo-Run's own lines break SC2207, SC2206, SC2128, SC2086 (lists of nodes) and SC2034. SC2016: the nodes' shell expands it.
    command = [SHELLCHECK, "--exclude=SC2207,SC2206,SC2128,SC2086,SC2034,SC2016", "-"]
    done = subprocess.run(command, input=script, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout
