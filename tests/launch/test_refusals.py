"""Wrong plans: `flextron launch` refuses each with one line and exit code 2, and writes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flextron_mcore import cli

CONFIG = {
    **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672},
    **{"num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
    **{"max_position_embeddings": 8192, "hidden_act": "silu", "rms_norm_eps": 1e-05},
}
FILES = {
    "large/config.json": json.dumps(CONFIG),
    "experts/config.json": json.dumps({**CONFIG, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}),
    "unread/config.json": json.dumps({**CONFIG, "attention_trick": 3}),
    "torn/config.json": json.dumps(CONFIG)[:40],
    "bare/README.md": "no model",
}
HF, LLAMA, TRAIN = "model=hf", "model=llama2/7b", "stages=[import,importance,elastic,router,joint]"
WRONG: dict[str, tuple[list[str], str]] = {
    "no hf": ([HF, "gpus=8"], "model=hf: missing hf=: set it to the directory"),
    "no such directory": ([HF, "hf=nowhere", "gpus=8"], "hf=*/nowhere: no such directory"),
    "no config": ([HF, "hf=bare", "gpus=8"], "bare/config.json: no such file"),
    "torn config": ([HF, "hf=torn", "gpus=8"], "torn/config.json: not readable as JSON"),
    "experts": (
        [HF, "hf=experts", "gpus=8"],
        "experts/config.json: architecture MixtralForCausalLM is not supported: it has experts",
    ),
    "unread key": ([HF, "hf=unread", "gpus=8"], "unread/config.json: *attention_trick"),
    "no gpus": ([HF, "hf=large"], "launch: missing gpus=..."),
    "no GPU": ([HF, "hf=large", "gpus=0"], "gpus=0 must be"),
    "gpus in words": ([HF, "hf=large", "gpus=eight"], "gpus=eight must be"),
    "too few GPUs": ([HF, "hf=large", "gpus=8", TRAIN], "gpus=8: no layout fits: *: use gpus=24"),
    "part of a node": ([HF, "hf=large", "gpus=12", TRAIN], "gpus=12: is not a multiple of the 8 GPUs of a node"),
    "a size of 3": (
        [HF, "hf=large", "gpus=64", TRAIN, "training.model.tensor_model_parallel_size=3"],
        "gpus=64: no layout divides * training.model.tensor_model_parallel_size=3",
    ),
    "latency of a large model": ([HF, "hf=large", "gpus=64"], "latency: needs *: leave latency out of stages="),
    "unknown model": (["model=llama2/8b"], "model=llama2/8b is not known"),
    "unknown cluster": ([LLAMA, "cluster=slrm"], "cluster=slrm is not known (did you mean 'slurm'?)"),
    "unknown GPU": ([LLAMA, "gpu=h300"], "gpu=h300 is not known"),
    "unknown stage": ([LLAMA, "stages=[import,elastik]"], "stages: 'elastik' is not known (did you mean 'elastic'?)"),
    "a stage twice": ([LLAMA, "stages=[import,import]"], "stages: 'import' is named twice"),
    "no stage": ([LLAMA, "stages=[]"], "stages=[]: name at least one of"),
    "unknown key": (
        [LLAMA, "elastic.trainer.max_stepz=7"],
        "unknown key 'trainer.max_stepz' (did you mean 'trainer.max_steps'?)",
    ),
    "unknown key of a layout": ([LLAMA, "layouts={8: {model: {tensor_size: 2}}}"], "unknown key 'layouts.8.model.tensor_size'"),
    "unknown unit": ([LLAMA, "budgets=[0.4 parsecs]"], "parsecs"),
    "a budget below 0": ([LLAMA, "budgets=[0.6,-0.4]"], "budget=-0.4: export can choose no network for it: give a share"),
    "no budget": ([LLAMA, "budgets=[0]"], "budget=0: export can choose no network for it"),
    "more than the full model": ([LLAMA, "budgets=[1.5]"], "budget=1.5: export can choose no network for it"),
    "less than the smallest network": ([LLAMA, "budgets=[1M]"], "budget=1M: 1 M is not within "),
    "a budget twice": ([LLAMA, "budgets=[0.4,0.6,0.4]"], "budgets: two of them would be exported to export_0.4"),
    "no time": ([LLAMA, "run.time_limit=soon"], "run.time_limit=soon: is not a time"),
    "too many minutes": ([LLAMA, "run.time_limit=01:99:00"], "run.time_limit=01:99:00: has more than 59 minutes or seconds"),
    "no time left": ([LLAMA, "run.time_limit=00:10:00"], "run.stop_before=00:20:00 leaves nothing of run.time_limit=00:10:00"),
    "spaces in a name": ([LLAMA, "run.name=a b"], "run.name=a b: write it as letters"),
    "spaces in a partition": ([LLAMA, "import.cluster.partition=a b"], "import: cluster.partition=a b"),
    "no account": ([LLAMA, "cluster.account="], "cluster.account"),
    "unknown memory": ([LLAMA, "cluster.gpu.memory=lots"], "cluster.gpu.memory=lots"),
    "small GPUs": ([LLAMA, "cluster.gpu.memory=16GB"], "elastic: needs * of each GPU"),
    "more GPUs than a node has": ([LLAMA, "elastic.trainer.devices=16"], "elastic: trainer.devices=16 is more than"),
    "a first batch that does not divide": (
        [LLAMA, "elastic.model.rampup_batch_size=[24,8,1000]"],
        "elastic: model.rampup_batch_size: leads to a global batch size of 24, which is not a multiple of *: use multiples of ",
    ),
    "a rampup that misses the batch": (
        [LLAMA, "elastic.model.rampup_batch_size=[64,100,1000]"],
        "elastic: model.rampup_batch_size=[64,100,1000]: does not lead to model.global_batch_size=",
    ),
    "a batch that does not divide": ([LLAMA, "elastic.model.global_batch_size=24"], "elastic: model.global_batch_size=24 is not"),
    "a sequence too long": ([LLAMA, "elastic.model.seq_length=5000"], "elastic: model.seq_length=5000 is more than"),
    "a granularity too small": ([LLAMA, "elastic.model.tensor_model_parallel_size=16"], "elastic: *granularity"),
    "half a recomputation": ([LLAMA, "elastic.model.recompute_granularity=full"], "elastic: *recompute_method=uniform or block"),
    "routers without depth": ([LLAMA, "importance.space.depth=[0.5,1.0]"], "router: space.depth is elastic"),
    "a variable of bash": ([LLAMA, "env_vars.PWD=/tmp"], "env_vars.PWD: the batch script's shell sets this variable itself"),
    "overwrite": ([LLAMA, "overwrite=true"], "overwrite=true: is not for launch"),
}


def arguments(folder: Path, name: str) -> list[str]:
    """Arguments of a wrong plan, whose files are written to `folder`."""
    for file, text in FILES.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
    given = [each.replace("hf=", f"hf={folder}/", 1) if each.startswith("hf=") else each for each in WRONG[name][0]]
    return ["launch", "cluster=slurm", "cluster.account=a", f"base_results_dir={folder}/results", f"data_dir={folder}", *given]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_is_one_line(name, tmp_path, capfd):
    words = arguments(tmp_path, name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    line = capfd.readouterr().err
    assert ended.value.code == cli.EXIT_BAD_INPUT == 2
    assert line.startswith("flextron: error: ") and line.count("\n") == 1, line
    place = 0
    for part in WRONG[name][1].split("*"):
        assert part in line[place:], line
        place = line.index(part, place) + len(part)
    assert sorted(tmp_path.rglob("*")) == before


def test_there_are_many():
    assert len(WRONG) >= 30
