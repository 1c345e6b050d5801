"""Commands of every stage on one tiny model, and the inputs that they take."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import yaml

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.choices import Choices
from flextron_mcore.training.sampler import random_family
from tests.faults.harness import Harness
from tests.routing_toy import latency, write_table
from tests.stages.conftest import TINY

TRAIN = [
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=1",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=2",
    "exp_manager.checkpoint_callback_params.keep_last=1",
    "exp_manager.create_tensorboard_logger=false",
]
BATCH = ["model.micro_batch_size=4", "model.global_batch_size=4"]
STEPS = "trainer.max_steps=4"
# Saves in the foreground are several seconds faster; `elastic` saves in the background.
AT_ONCE = "exp_manager.checkpoint_callback_params.async_save=false"
SHARDS = "max_shard_size=20000"
# Recipe that `quickstart` runs here: the first command of the real one, a training, and what its summary and exports need.
CHAIN = {
    "data": ("prepare", ["input=${input}", "vocab_size=300", "valid_fraction=0.2"]),
    "evaluate_before": ("evaluate", ["checkpoint=INPUTS/sorted", "data=INPUTS/data", "limit_val_batches=1"]),
    "elastic": ("elastic", ["checkpoint=INPUTS/sorted", "data=INPUTS/data", *TRAIN, *BATCH, "trainer.max_steps=2"]),
    "evaluate": ("evaluate", ["checkpoint={out}/elastic", "data=INPUTS/data", "limit_val_batches=1"]),
    "export": ("export", ["checkpoint={out}/elastic", "subnetwork={out}/networks/half.json", "verify=false"]),
}
ROUTERS = ["targets_per_step=2", "candidate_samples=4", "validation_targets=[0.8]"]


def commands(inputs: Path, out: Path) -> dict[str, list[str]]:
    """{name: arguments} of the commands, which read below `inputs` and write to `out`."""
    data, elastic = f"data={inputs}/data", f"checkpoint={inputs}/elastic"
    loop = [data, *TRAIN, *BATCH]
    found: Mapping[str, list[str]] = {
        "prepare": [f"input=[{inputs}/text/code,{inputs}/text/prose]", "vocab_size=300", "valid_fraction=0.2"],
        "pretrain": [data, *TRAIN, AT_ONCE, *(f"model.{key}" for key in TINY), STEPS],
        "import": [f"hf={inputs}/hf"],
        "import_shards": [f"hf={inputs}/hf_shards"],
        "importance": [f"checkpoint={inputs}/parent", data, "samples=8", "ablation_batches=1"],
        "elastic": [f"checkpoint={inputs}/sorted", *loop, STEPS],
        "latency": [elastic, f"measurements={inputs}/measured.json"],
        "router": [elastic, f"latency={inputs}/latency", *loop, STEPS, *ROUTERS],
        "adaptive": [
            f"checkpoint={inputs}/router",
            *loop,
            STEPS,
            AT_ONCE,
            *("kind=adaptive", "targets_per_step=2", "adaptive.calibration_samples=4", "validation_targets=[0.8]"),
        ],
        "joint": [f"checkpoint={inputs}/router", *loop, AT_ONCE, STEPS, "targets_per_step=2", "validation_targets=[0.8]"],
        "gumbel": [f"checkpoint={inputs}/sorted", *loop, AT_ONCE, STEPS, "targets_per_step=2", "candidate_samples=4"],
        "sensitivity": [elastic, data, "limit_val_batches=1"],
        "select": [elastic, "budget=0.7 parameters", "selector=uniform", "measure=false"],
        "compare": [elastic, data, "selectors=[uniform]", "targets=[0.8]", "random_at_target=1", "limit_val_batches=1"],
        "evaluate": [elastic, data, "limit_val_batches=1"],
        "generate": [elastic, "prompt=def main(", "max_new_tokens=2"],
        "export": [elastic],
        "export_elastic": [elastic, "format=hf_elastic"],
        "export_gguf": [elastic, "format=gguf", "verify=false"],
        "export_megatron": [elastic, "format=megatron"],
        "export_trtllm": [elastic, "format=trtllm"],
        "export_shards": [elastic, SHARDS, "verify=false"],
        "family": [elastic, data, "budgets=[0.8 parameters]", "selector=uniform", "limit_val_batches=1"],
        "report": [f"run={inputs}"],
        "quickstart": ["--config-dir", f"{inputs}/conf", "recipe=short_chain", f"input={inputs}/text/code"],
    }
    stages = {"adaptive": "router"}
    named = {name: [stages.get(name, name.split("_")[0]), *keys, f"out={out}"] for name, keys in found.items()}
    return named | {"launch": _launch(inputs, out)}


def _launch(inputs: Path, out: Path) -> list[str]:
    """Arguments of a `launch` that runs two stages on this machine, each in a process of its own."""
    keys = ["cluster=local", "model=smoke", "launch=smoke", "gpus=1", "budgets=null", "stages=[latency,export]"]
    keys += ["model.vocab_size=300", *(f"model.{key}" for key in TINY if "batch" not in key)]
    own = [f"latency.measurements={inputs}/measured.json", f"latency.checkpoint={inputs}/elastic", "export.verify=false"]
    place = [f"base_results_dir={out.parent}", f"run.name={out.name}", f"export.checkpoint={inputs}/elastic"]
    return ["launch", *keys, *own, *place]


def only_reading(inputs: Path, out: Path) -> dict[str, list[str]]:
    """{name: arguments} of commands that write nothing."""
    elastic = f"checkpoint={inputs}/elastic"
    return {
        "launch": [*_launch(inputs, out), "dry_run=true"],
        "select": ["select", elastic, "budget=0.7 parameters", "selector=uniform", "measure=false"],
        "generate": ["generate", elastic, "prompt=def main(", "max_new_tokens=2"],
    }


OVERWRITTEN = ("prepare", "elastic", "router", "select", "export", "export_gguf", "import", "family", "quickstart")
TRAINING = ("pretrain", "elastic", "router", "adaptive", "joint", "gumbel")
# Commands that write into `out` step by step and continue there. The others publish a whole `out` at their end.
CONTINUING = (*TRAINING, "family", "quickstart", "launch")
NAMES = tuple(commands(Path("in"), Path("out")))


def make_inputs(harness: Harness, text: Path, inputs: Path) -> None:
    """Run the chain whose results the commands take."""
    inputs.mkdir()
    os.symlink(text, inputs / "text")

    def run(name: str, folder: str, *more: str) -> None:
        argv = [*commands(inputs, inputs / folder)[name], *more]
        done = harness.run(argv, inputs)
        assert done.code == 0, (argv, done.errors[-5:])

    for name, folder in (("prepare", "data"), ("pretrain", "parent"), ("importance", "sorted"), ("elastic", "elastic")):
        run(name, folder)
    write_table(inputs / "elastic", inputs / "latency" / "latency.json")
    run("router", "router")
    run("export", "hf", "verify=false")
    run("export_shards", "hf_shards")
    assert len(list((inputs / "hf_shards").glob("*.safetensors"))) > 2
    chain = {
        name: {"stage": stage, "keys": [key.replace("INPUTS", str(inputs)) for key in keys]}
        for name, (stage, keys) in CHAIN.items()
    }
    (inputs / "conf" / "recipe").mkdir(parents=True)
    (inputs / "conf" / "recipe" / "short_chain.yaml").write_text(
        "# @package _global_\n" + yaml.safe_dump({"chain": chain}, width=10**6)
    )
    info = open_checkpoint(inputs / "elastic")
    cost = latency(Choices(info.model, info.space))
    nets = random_family(info.model, info.space, 0, 0, 12, "flextron").values()
    (inputs / "measured.json").write_text(json.dumps([{"subnetwork": net.to_dict(), "ms": cost.of(net)} for net in nets]))
