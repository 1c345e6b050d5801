"""Results do not depend on the parallel layout.

Training at every layout has the losses and gradient norms of one process, and a run that continues at another layout equals the
uninterrupted one. FLEXTRON_LAYOUTS=all runs them all, else those of SHORT run.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from flextron_mcore.checkpoint.store import CheckpointInfo, list_checkpoints, open_checkpoint
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.runs.output import METRICS_FILE
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.space import ElasticSpace
from flextron_mcore.training.log import LOG_FILE
from flextron_mcore.training.sampler import draw
from tests import toy
from tests.parallel.worker import chosen, run_jobs
from tests.stages.conftest import stage

VOCABULARY = 301  # odd, so tensor-parallel ranks pad it
STEPS = 4
TP2, TP4, PP2, PP4 = (f"model.{kind}_model_parallel_size={n}" for kind in ("tensor", "pipeline") for n in (2, 4))
VIRTUAL, SEQUENCE = "model.virtual_pipeline_model_parallel_size=2", "model.sequence_parallel=true"
DISTRIBUTED = "model.ddp.use_distributed_optimizer=true"
OVERLAP = ["model.ddp.overlap_grad_reduce=true", "model.ddp.bucket_size=5000"]
GATHER = [DISTRIBUTED, *OVERLAP, "model.ddp.overlap_param_gather=true"]
FULL = ["model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1"]
SELECTIVE = ["model.recompute_granularity=selective", "model.recompute_modules=[core_attn,mlp]"]
# name: (processes, model, keys)
LAYOUTS: dict[str, tuple[int, str, list[str]]] = {
    "TP2": (2, "llama", [TP2]),
    "TP2 SP": (2, "llama", [TP2, SEQUENCE]),
    "PP2": (2, "llama", [PP2]),
    "PP2 virtual": (2, "llama", [PP2, VIRTUAL]),
    "PP2 uneven": (2, "llama", [PP2, "model.num_layers_in_first_pipeline_stage=1"]),
    "PP2 full recomputation": (2, "llama", [PP2, *FULL]),
    "PP2 virtual selective recomputation": (2, "llama", [PP2, VIRTUAL, *SELECTIVE]),
    "DP2": (2, "llama", []),
    "DP2 overlap": (2, "llama", OVERLAP),
    "DP2 distributed optimizer": (2, "llama", [DISTRIBUTED]),
    "DP2 distributed optimizer overlap": (2, "llama", GATHER),
    "DP2 one sample at a time": (2, "llama", ["model.micro_batch_size=1"]),
    "TP2 SP gpt2": (2, "gpt2", [TP2, SEQUENCE]),
    "TP2 qwen": (2, "qwen", [TP2]),
    "TP2 SP qwen": (2, "qwen", [TP2, SEQUENCE]),
    "PP2 virtual gpt2": (2, "gpt2", [PP2, VIRTUAL]),
    "TP2 distilled": (2, "distilled", [TP2]),
    "PP2 virtual distilled": (2, "distilled", [PP2, VIRTUAL]),
    "TP2 SP taught": (2, "taught", [TP2, SEQUENCE]),
    "PP2 virtual taught": (2, "taught", [PP2, VIRTUAL]),
    "PP2 uneven taught": (2, "taught", [PP2, "model.num_layers_in_first_pipeline_stage=1"]),
    "DP2 distributed optimizer overlap taught": (2, "taught", GATHER),
    "TP2 SP bf16": (2, "bf16", [TP2, SEQUENCE]),
    "PP2 bf16": (2, "bf16", [PP2]),
    "DP2 distributed optimizer bf16": (2, "bf16", GATHER),
    "TP4": (4, "llama", [TP4]),
    "PP4": (4, "llama", [PP4]),
    "TP2 PP2": (4, "llama", [TP2, PP2]),
    "TP2 DP2": (4, "llama", [TP2]),
    "TP2 DP2 everything": (4, "llama", [TP2, SEQUENCE, *GATHER, *FULL]),
    "PP2 virtual DP2 everything": (4, "llama", [PP2, VIRTUAL, *GATHER, *FULL]),
    "TP2 PP2 SP gpt2": (4, "gpt2", [TP2, PP2, SEQUENCE]),
}
# name: (processes, the run that it continues from half its steps, keys)
CONTINUED: dict[str, tuple[int, str, list[str]]] = {
    "TP2 DP2, then TP4": (4, "TP2 DP2", [TP4]),
    "TP2 DP2 everything, then TP2 PP2": (4, "TP2 DP2 everything", [TP2, PP2, DISTRIBUTED]),
    "TP2 DP2, then PP2": (2, "TP2 DP2", [PP2]),
    "TP2 DP2 everything, then DP2": (2, "TP2 DP2 everything", [DISTRIBUTED]),
    "PP2 virtual, then TP2": (2, "PP2 virtual", [TP2]),
    "TP2 PP2 SP gpt2, then DP2": (2, "TP2 PP2 SP gpt2", []),
    "PP2 virtual taught, then TP2": (2, "PP2 virtual taught", [TP2]),
}
# A list that has every kind of parallelism, optimizer, schedule, recomputation, loss and precision once.
SHORT = {
    "TP2 SP",
    "TP2 qwen",
    "TP2 distilled",
    "PP2 uneven",
    "PP2 virtual selective recomputation",
    "PP2 virtual taught",
    "DP2 distributed optimizer overlap",
    "DP2 distributed optimizer bf16",
    "TP2 DP2 everything",
    "TP2 PP2 SP gpt2",
}
LAYOUTS = chosen(LAYOUTS, SHORT)
CONTINUED = chosen(CONTINUED, {"TP2 DP2 everything, then TP2 PP2", "TP2 PP2 SP gpt2, then DP2"})


def trained(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """(losses of every network in every step and validation, gradient norms of every step) in a run's log."""
    losses, norms = [], []
    for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()):
        if row["event"] == "train":
            losses += [row["loss"], *row["subnetwork_losses"], *row.get("distillation_losses", [])]
            norms.append(row["grad_norm"])
        else:
            losses += row["losses"].values()
    return torch.tensor(losses), torch.tensor(norms)


def interrupt(source: str, run: str) -> None:
    """Copy a finished run as it was after half of its steps. Called on all ranks, of which rank 0 copies."""
    if torch.distributed.get_rank() == 0:
        shutil.copytree(source, run)
        Path(run, METRICS_FILE).unlink()
        log = Path(run, LOG_FILE)
        log.write_text(
            "".join(line for line in log.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= STEPS // 2)
        )
        shutil.rmtree(list_checkpoints(Path(run))[-1])


def stock_logits(checkpoint: str, out: str) -> None:
    """Save logits of Megatron-Core's own GPTModel, loaded from an elastic checkpoint on two tensor-parallel ranks."""
    from megatron.core import dist_checkpointing
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from flextron_mcore.model import transformer_config
    from flextron_mcore.runtime import distributed

    distributed.initialize(LayoutSettings(tensor_model_parallel_size=2))
    info = open_checkpoint(checkpoint)
    model = GPTModel(
        transformer_config(info.model, LayoutSettings(tensor_model_parallel_size=2)),
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=info.model.vocab_size + 1,
        max_sequence_length=info.model.max_position_embeddings,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=True,
    ).eval()
    wanted = {"model": model.sharded_state_dict(metadata={"non_homogeneous_layers": True})}
    model.load_state_dict(dist_checkpointing.load(wanted, str(info.path))["model"])
    tokens, positions = toy.inputs(batch=3, vocab=info.model.vocab_size)
    mask = torch.ones(toy.LENGTH, toy.LENGTH, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        logits = gather_from_tensor_model_parallel_region(model(tokens, positions, mask))
    torch.save(logits[..., : info.model.vocab_size], f"{out}.{torch.distributed.get_rank()}")


class Runs:
    """Directory of all training runs, and the jobs that make them."""

    def __init__(self, root: Path, text: Path) -> None:
        self.root = root
        stage(
            "prepare", f"input=[{text}/code,{text}/prose]", f"vocab_size={VOCABULARY}", "valid_fraction=0.2", f"out={root}/data"
        )
        size = dict(num_layers=4, num_attention_heads=8, vocab_size=VOCABULARY, ffn_hidden_size=64)
        llama = toy.config(**size, share_embeddings_and_output_weights=True)
        gpt2 = toy.config(**size, **toy.GPT2, num_query_groups=4)
        qwen = toy.config(**size, add_qkv_bias=True, qk_layernorm=True, sliding_window=9)
        for name, arch, space in (
            ("llama", llama, dict(ffn_hidden_size=[0.25, 0.5, 1.0], layer_ranking=[0, 3, 1, 2], modulation=True)),
            ("gpt2", gpt2, dict(attention_unit="query_head", layer_ranking=[3, 0, 2, 1], compensation=True)),
            ("qwen", qwen, {}),
        ):
            # With depth 1, one of two pipeline stages has no layer to execute.
            axes = dict(heads=[0.5, 1.0], hidden_size=[0.25, 0.5, 1.0], depth=[1, 3, 4])
            built = ElasticSpace.build(arch, granularity=4, **axes, **space)
            toy.write(toy.model(arch, built), CheckpointInfo(arch, built), root / "start" / name)

    def path(self, name: str) -> Path:
        return self.root / name.replace(" ", "_").replace(",", "")

    def keys(self, name: str, model: str, *layout: str) -> list[str]:
        distilled = ["distillation.weight=0.5", "distillation.temperature=2.0"]
        taught = [*distilled, f"teacher={self.root}/start/gpt2"]
        more = {"distilled": distilled, "taught": taught, "bf16": ["trainer.precision=bf16"]}
        return [
            f"checkpoint={self.root}/start/{model if model in ('gpt2', 'qwen') else 'llama'}",
            f"data={self.root}/data",
            "model.micro_batch_size=2",
            "model.global_batch_size=8",
            f"trainer.max_steps={STEPS}",
            f"trainer.val_check_interval={STEPS}",
            "trainer.limit_val_batches=1",
            "model.optim.sched.warmup_steps=0",
            "exp_manager.create_tensorboard_logger=false",
            f"exp_manager.checkpoint_callback_params.every_n_train_steps={STEPS // 2}",
            "exp_manager.checkpoint_callback_params.async_save=false",
            f"out={self.path(name)}",
            *more.get(model, []),
            *layout,
        ]

    def jobs(self, processes: int) -> list[dict[str, Any]]:
        """Jobs for this number of processes: runs, then their continuations, each sorted by process groups."""
        runs, more = [], []
        for name, (count, model, layout) in LAYOUTS.items():
            if count == processes:
                runs.append([{"stage": "elastic", "keys": self.keys(name, model, *layout), "layout": groups(layout)}])
        for name, (count, source, layout) in CONTINUED.items():
            if count == processes:
                copy = {"source": str(self.path(source)), "run": str(self.path(name))}
                keys = self.keys(name, LAYOUTS[source][1], *layout)
                call = {"call": "tests.parallel.test_layouts:interrupt", "arguments": copy, "layout": groups(layout)}
                more.append([call, {"stage": "elastic", "keys": keys, "layout": groups(layout)}])
        order = lambda jobs: jobs[0]["layout"]  # noqa: E731
        return [job for jobs in (*sorted(runs, key=order), *sorted(more, key=order)) for job in jobs]


def groups(layout: list[str]) -> str:
    """Keys of a layout that decide its process groups."""
    return " ".join(key for key in layout if "_parallel_size=" in key)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, text) -> Runs:
    """All training runs, finished: in one process, in four, and in two."""
    found = Runs(tmp_path_factory.mktemp("layouts"), text)
    for model in ("llama", "gpt2", "qwen", "distilled", "taught", "bf16"):
        stage("elastic", *found.keys(f"one {model}", model))
    for processes in (4, 2):
        for job in run_jobs(processes, found.jobs(processes), tmp_path_factory.mktemp("jobs")):
            assert all("error" not in rank for rank in job), job
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_is_that_of_one_process(runs, name):
    model = LAYOUTS[name][1]
    for found, expected in zip(trained(runs.path(name)), trained(runs.path(f"one {model}")), strict=True):
        tolerance = 5e-3 if model == "bf16" else 1e-5  # bf16 has 8 bits: a relative error of 4e-3
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert open_checkpoint(runs.path(name)).space == open_checkpoint(runs.path(f"one {model}")).space


@pytest.mark.parametrize("name", CONTINUED)
def test_a_run_continued_at_another_layout_is_the_uninterrupted_run(runs, name):
    for found, expected in zip(
        trained(runs.path(name)), trained(runs.path(f"one {LAYOUTS[CONTINUED[name][1]][1]}")), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [folder.name for folder in list_checkpoints(runs.path(name))] == [f"iter_{step:07}" for step in (STEPS // 2, STEPS)]


def test_compared_losses_differ_by_run_and_by_step(runs):
    losses = {model: trained(runs.path(f"one {model}"))[0] for model in ("llama", "gpt2", "distilled", "taught")}
    # the losses of the last validation
    ends = [losses[model][-7:] for model in ("llama", "distilled", "taught")]
    assert min((some - others).abs().max() for some, others in itertools.combinations(ends, 2)) > 1e-3
    for values in losses.values():
        every = [round(loss, 3) for loss in values.tolist()]
        assert len(set(every)) > 0.7 * len(every)
    for model in ("llama", "gpt2"):
        info = open_checkpoint(runs.path(f"one {model}"))
        drawn = [net for step in range(STEPS) for net in draw(info.model, info.space, 1234, step, 3)]
        depths = [sum(layer.executed for layer in net.layers) for net in drawn]
        assert {net.hidden_size for net in drawn} == {8, 16, 32} and set(depths) == {1, 3, 4}
        assert depths[-1] < 4  # a step's last network skips layers: overlapping reduction then waits for all parameters


def test_a_trained_checkpoint_is_the_same_function_everywhere(runs, tmp_path, tmp_path_factory):
    """A checkpoint trained in four processes has the same logits in one process, in two at each layout, and in a stock model."""
    trained_run = runs.path("TP2 DP2 everything")
    info = open_checkpoint(trained_run)
    nets = {f"net{seed}": toy.random_network(info.model, info.space, seed) for seed in range(2)}
    for name, net in nets.items():
        (tmp_path / f"{name}.json").write_text(net.to_json())
    layouts = {
        "tp": {"tensor_model_parallel_size": 2},
        "sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        "pp": {"pipeline_model_parallel_size": 2},
        "vpp": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        "dp": {},
    }
    jobs = [
        {
            "call": "tests.parallel.probe:logits",
            "arguments": {"checkpoint": str(trained_run), "out": f"{tmp_path}/{layout}-{name}", "layout": options}
            | ({"net": f"{tmp_path}/{name}.json"} if name != "full" else {}),
        }
        for layout, options in layouts.items()
        for name in ("full", *nets)
    ]
    jobs.append(
        {
            "call": "tests.parallel.test_layouts:stock_logits",
            "arguments": {"checkpoint": str(trained_run), "out": f"{tmp_path}/stock-full"},
        }
    )
    run_jobs(2, jobs, tmp_path_factory.mktemp("jobs"))
    one = build_loaded(info)
    tokens, positions = toy.inputs(batch=3, vocab=VOCABULARY)
    expected = {}
    for name, net in {"full": None, **nets}.items():
        with torch.no_grad(), use_subnetwork(one, net):
            expected[name] = one(tokens, positions, None)
    files = sorted(tmp_path.glob("*.[01]"))
    assert len(files) == 2 * (3 * len(layouts) + 1)
    for file in files:
        name = file.stem.split("-")[1]
        torch.testing.assert_close(torch.load(file), expected[name], rtol=0, atol=1e-5, msg=lambda m, f=file: f"{f.name}: {m}")


def build_loaded(info: CheckpointInfo) -> torch.nn.Module:
    from flextron_mcore.checkpoint.reader import load_model
    from flextron_mcore.model import build_model

    model = build_model(info.model, info.space, initialize=False).eval()
    load_model(model, info)
    return model
