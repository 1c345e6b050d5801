"""Planning: from the settings of `flextron launch` to jobs."""

from __future__ import annotations

import pytest

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.launch.check import check_configuration, check_layouts, missing
from flextron_mcore.launch.flops import Costs
from flextron_mcore.launch.plan import clock, plan, seconds
from flextron_mcore.launch.resources import COLUMNS, check_memory, gpu_memory, job_estimate, resources
from flextron_mcore.launch.slurm import Submitted
from flextron_mcore.launch.texts import mounted
from flextron_mcore.settings.launch import LaunchSettings
from flextron_mcore.space import ElasticSpace
from flextron_mcore.stages.launch import _record
from tests import toy

PAPER = ("gpt3/2b", "gpt3/8b", "llama2/7b", "llama3/8b")
FAMILIES = ("llama3.1/8b", "mistral/7b", "ministral/8b", "qwen2/3b", "qwen3/8b", "smollm3/3b", "phi3/4b", "nemotron/8b")
BARE = ("cluster=slurm", "cluster.account=a")


@pytest.mark.parametrize("cluster", ["bcm", "slurm"])
@pytest.mark.parametrize("gpus", [8, 32, 128])
@pytest.mark.parametrize("model", [*PAPER, *FAMILIES])
def test_every_configuration_is_whole_and_fits(launch, model, gpus, cluster):
    config = launch(f"cluster={cluster}", "cluster.account=a", f"model={model}", f"gpus={gpus}")
    planned = plan(config)
    check_configuration(config, planned)
    check_memory(config, planned)
    check_layouts(planned)
    assert not planned.problems
    jobs = {job.name: job for job in planned.jobs}
    elastic = jobs["elastic"]
    assert elastic.ranks == gpus
    options = elastic.settings
    # values of the Flextron paper, section 4
    assert options.model.global_batch_size == 256 and options.model.seq_length == 4096 and options.trainer.max_steps == 80000
    assert options.num_subnetworks == 3 and jobs["importance"].settings.samples == 512
    assert all(len(axis) == 4 for axis in (planned.space.heads, planned.space.ffn_hidden_size))
    assert jobs["router"].settings.trainer.max_steps == 1000 and jobs["router"].settings.model.global_batch_size == 256
    joint = jobs["joint"].settings
    assert joint.trainer.max_steps * joint.model.global_batch_size * joint.model.seq_length == pytest.approx(2.62e9, rel=0.01)


@pytest.mark.parametrize("gpus", [8, 32, 128])
@pytest.mark.parametrize("model", PAPER)
def test_the_recipe_of_all_axes_is_whole_and_fits(launch, model, gpus, tmp_path):
    # hf= is given, because the recipe imports a checkpoint, and models gpt3 have none by default
    config = launch(*BARE, f"model={model}", f"gpus={gpus}", "recipe=llamaflex", "hf=somewhere")
    planned = plan(config)
    check_configuration(config, planned)
    check_memory(config, planned)
    assert not planned.problems and planned.results.name.endswith("_llamaflex")
    jobs = {job.name: job.settings for job in planned.jobs}
    gumbel = jobs["gumbel"]
    assert gumbel.trainer.max_steps * gumbel.model.global_batch_size * gumbel.model.seq_length == pytest.approx(60e9, rel=0.01)
    assert len(planned.space.hidden_size) == len(planned.space.depth) == 5
    taken = {name: (getattr(config, "checkpoint", None), getattr(config, "latency", None)) for name, config in jobs.items()}
    results = str(planned.results)
    assert taken == {
        "import": (None, None),
        "importance": (f"{results}/import", None),
        "latency": (f"{results}/importance", None),
        "gumbel": (f"{results}/importance", f"{results}/latency"),
        "family": (f"{results}/gumbel", None),
    }
    assert jobs["family"].budgets == [0.4, 0.6, 0.8] and jobs["family"].model.micro_batch_size == 1


@pytest.mark.parametrize("model", [*PAPER, *FAMILIES])
def test_the_short_recipe_is_a_tenth_of_the_paper(launch, model):
    configs = [launch(*BARE, f"model={model}", f"recipe={recipe}", "hf=somewhere") for recipe in ("null", "short")]
    whole, short = (
        {job.name: job.settings for job in planned.jobs if job.trains} for planned in (plan(config) for config in configs)
    )
    check_configuration(configs[1], plan(configs[1]))
    check_memory(configs[1], plan(configs[1]))
    steps = {name: (whole[name].trainer.max_steps, short[name].trainer.max_steps) for name in whole if name != "pretrain"}
    assert steps == {"elastic": (80000, 8000), "router": (1000, 500), "joint": (2500, 250)}
    assert all(job.model.optim.sched.warmup_steps <= job.trainer.max_steps / 10 for job in (short["elastic"], short["joint"]))
    assert configs[1].run.results_dir == f"{configs[0].run.results_dir}_short"


def test_a_model_of_long_sequences_is_planned_as_it_is_shipped(launch):
    """Llama 3.1 differs from Llama 3 in positions and rotary frequencies; its stages take 4096 tokens like those of Llama 3."""
    old, new = (plan(launch(*BARE, f"model={name}/8b")) for name in ("llama3", "llama3.1"))
    differing = {name for name, value in new.model.to_dict().items() if value != old.model.to_dict()[name]}
    assert differing == {"max_position_embeddings", "rope_scaling"} and new.model.max_position_embeddings == 131072
    assert {job.name: job_estimate(old, job) for job in old.jobs} == {job.name: job_estimate(new, job) for job in new.jobs}


def test_stages_take_what_was_planned_before_what_is_complete(launch, tmp_path):
    """A planned stage is preferred to a complete one on disk: with elastic planned, latency and gumbel take its checkpoint."""
    results = tmp_path / "results" / "llama2_7b"
    (results / "joint").mkdir(parents=True)
    (results / "joint" / "metrics.json").write_text("{}")
    stages = "stages=[import,importance,elastic,latency,gumbel,evaluate,family,export,compare]"
    jobs = {job.name: job for job in plan(launch(*BARE, "model=llama2/7b", stages, "budgets=[25ms]", "family.formats=[]")).jobs}
    taken = {name: getattr(job.settings, "checkpoint", None) for name, job in jobs.items()}
    assert taken["latency"] == taken["gumbel"] == f"{results}/elastic"
    assert {taken[name] for name in ("evaluate", "family", "export_25ms", "compare")} == {f"{results}/gumbel"}
    assert jobs["gumbel"].trains and jobs["gumbel"].ranks == 32 and jobs["family"].ranks == 1
    assert jobs["family"].settings.budgets == ["25ms"]
    only = {
        job.name: job.settings for job in plan(launch(*BARE, "model=llama2/7b", "stages=[family]", "family.budgets=[0.7]")).jobs
    }
    assert only["family"].checkpoint == f"{results}/joint" and only["family"].budgets == [0.7]
    unsaid = plan(launch(*BARE, "model=llama2/7b", "stages=[family]", "budgets=null"))
    assert unsaid.problems == ["family: missing family.budgets="]


@pytest.mark.parametrize(
    "model, parameters, beside_embeddings",
    # Touvron et al. 2023; Grattafiori et al. 2024; without embeddings: the Flextron paper, section 4
    [
        *(("llama2/7b", 6.74e9, 6.48e9), ("llama3/8b", 8.03e9, 6.98e9), ("gpt3/2b", 2.25e9, 1.2e9), ("gpt3/8b", 8.5e9, 6.4e9)),
        # the models' cards
        *(("llama3.1/8b", 8.03e9, 6.98e9), ("mistral/7b", 7.25e9, 6.98e9), ("qwen2/3b", 3.09e9, 2.77e9)),
        *(("qwen3/8b", 8.19e9, 6.95e9), ("smollm3/3b", 3.08e9, 2.81e9), ("phi3/4b", 3.82e9, 3.62e9)),
        *(("nemotron/8b", 8.27e9, 6.17e9), ("ministral/8b", 8.02e9, 6.95e9)),
    ],
)
def test_models_have_their_sizes(launch, model, parameters, beside_embeddings):
    from flextron_mcore.space import count_parameters

    arch = plan(launch(*BARE, f"model={model}")).model
    assert count_parameters(arch) == pytest.approx(parameters, rel=0.01)
    assert count_parameters(arch, embeddings=False) == pytest.approx(beside_embeddings, rel=0.01)


def test_each_stage_takes_the_result_of_the_one_before(launch, tmp_path):
    planned = plan(launch(*BARE, "model=llama2/7b"))
    results = tmp_path / "results" / "llama2_7b"
    jobs = {job.name: job.settings for job in planned.jobs}
    assert list(jobs) == [
        "import",
        "importance",
        "elastic",
        "latency",
        "router",
        "joint",
        "export_0.4",
        "export_0.6",
        "export_0.8",
    ]
    assert jobs["import"].hf == f"{tmp_path}/data/Llama-2-7b-hf"
    taken = {name: getattr(config, "checkpoint", None) for name, config in jobs.items()}
    assert taken == {
        "import": None,
        "importance": f"{results}/import",
        "elastic": f"{results}/importance",
        "latency": f"{results}/elastic",
        "router": f"{results}/elastic",
        "joint": f"{results}/router",
        **{f"export_{budget}": f"{results}/joint" for budget in (0.4, 0.6, 0.8)},
    }
    assert jobs["router"].latency == f"{results}/latency" and jobs["elastic"].data == f"{tmp_path}/data/prepared"
    assert jobs["export_0.6"].budget == 0.6 and jobs["export_0.6"].data is None
    assert all(config.out == str(results / name) for name, config in jobs.items())


def test_an_export_that_compensates_takes_the_data(launch, tmp_path):
    planned = plan(launch(*BARE, "model=llama2/7b", "export.compensate=true"))
    settings = {job.settings.data for job in planned.jobs if job.stage == "export"}
    assert settings == {f"{tmp_path}/data/prepared"} and not planned.problems


def test_complete_stages_are_not_run_again_and_serve_as_input(launch, tmp_path):
    results = tmp_path / "results" / "llama2_7b"
    (results / "importance").mkdir(parents=True)
    arguments = (*BARE, "model=llama2/7b", "stages=[importance,elastic]", f"importance.checkpoint={tmp_path}/mine")
    assert [job.name for job in plan(launch(*arguments)).to_run] == ["importance", "elastic"]
    assert plan(launch(*BARE, "model=llama2/7b", "stages=[elastic]")).problems  # importance is there but not complete
    (results / "importance" / "metrics.json").write_text("{}")
    planned = plan(launch(*arguments))
    assert [job.name for job in planned.to_run] == ["elastic"]
    only = plan(launch(*BARE, "model=llama2/7b", "stages=[elastic]"))
    assert not only.problems and only.jobs[0].settings.checkpoint == str(results / "importance")


def test_keys_of_a_stage_go_to_it_alone(launch):
    planned = plan(
        launch(
            *BARE,
            "model=llama2/7b",
            "elastic.trainer.max_steps=7",
            "elastic.run.time_limit=02:00:00",
            "training.model.seq_length=2048",
            "export.budget=25ms",
        )
    )
    jobs = {job.name: job for job in planned.jobs}
    assert jobs["elastic"].settings.trainer.max_steps == 7 and jobs["router"].settings.trainer.max_steps == 1000
    assert jobs["elastic"].time_limit == 7200 and jobs["elastic"].settings.trainer.max_time == "00:01:40:00"
    assert jobs["joint"].time_limit == 86400 and jobs["joint"].settings.trainer.max_time == "00:23:40:00"
    assert {name: job.settings.model.seq_length for name, job in jobs.items() if job.trains} == dict.fromkeys(
        ("elastic", "router", "joint"), 2048
    )
    assert jobs["export"].settings.budget == "25ms"


def test_a_teacher_is_mounted_and_counted(launch, tmp_path):
    """A teacher may be the result of an earlier job of the same launch."""
    parent = tmp_path / "results" / "llama2_7b" / "import"
    taught = [*BARE, "model=llama2/7b", "elastic.distillation.weight=1"]
    settings = launch(*taught, f"elastic.teacher={parent}")
    plain, planned = plan(launch(*BARE, "model=llama2/7b")), plan(settings)
    one, two = (next(job for job in each.jobs if job.name == "elastic") for each in (plain, planned))
    assert two.settings.teacher == str(parent) and ("elastic.teacher", str(parent)) in mounted(planned)
    before, after = job_estimate(plain, one), job_estimate(planned, two)
    assert after.weights == 2 * before.weights and after.gradients == before.gradients and after.optimizer == before.optimizer
    length = one.settings.model.seq_length or plain.model.default_length
    costs = Costs(plain.model, plain.space, length, one.settings.model.tensor_model_parallel_size)
    assert after.flops - before.flops == pytest.approx(before.tokens * costs.full)
    assert not [line for line in missing(settings, planned) if ".teacher=" in line]
    arch = toy.config(vocab_size=67)
    toy.write(toy.model(arch, ElasticSpace.build(arch)), CheckpointInfo(arch, ElasticSpace.build(arch)), tmp_path / "other")
    other = launch(*taught, f"elastic.teacher={tmp_path}/other")
    lines = [line for line in missing(other, plan(other)) if ".teacher=" in line]
    expected = f"elastic.teacher={tmp_path}/other: has a vocabulary of 67 tokens, the model one of 32000: choose a teacher"
    assert len(lines) == 1 and lines[0].startswith(expected)


def test_locally_training_has_no_time_limit(launch):
    planned = plan(launch("cluster=local", "model=smoke"))
    assert all(job.settings.trainer.max_time is None for job in planned.jobs if job.trains)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["elastic.trainer.max_stepz=7"], r"elastic: unknown key 'trainer.max_stepz' \(did you mean 'trainer.max_steps'\?\)"),
        (["elastik.trainer.max_steps=7"], r"launch: unknown key 'elastik.trainer.max_steps'"),
        (["model=llama2/8b"], r"llama2/?=?8b"),
        (["stages=[import,elastik]"], r"stages: 'elastik' is not known \(did you mean 'elastic'\?\)"),
        (["stages=[import,import]"], r"stages: 'import' is named twice"),
        (["stages=[]"], r"stages=\[\]: name at least one"),
        (["gpus=12"], r"gpus=12: is not a multiple of the 8 GPUs of a node \(cluster.gpus_per_node\): use gpus=8 or gpus=16"),
        (["run.time_limit=soon"], r"run.time_limit=soon: is not a time"),
        (["run.time_limit=00:10:00"], r"run.stop_before=00:20:00 leaves nothing of run.time_limit=00:10:00"),
        (["elastic.model.tensor_model_parallel_size=3"], "elastic: 32 ranks are not a multiple of .*size=3 x"),
        (["elastic.model.tensor_model_parallel_size=16"], r"elastic: .*granularity"),
        (["elastic.model.global_batch_size=24"], r"elastic: model.global_batch_size=24 is not a multiple of .*=1 x 16"),
        (["elastic.model.seq_length=5000"], r"elastic: model.seq_length=5000 is more than the model's 4096 positions"),
        (["elastic.trainer.devices=16"], r"elastic: trainer.devices=16 is more than cluster.gpus_per_node=8"),
        (["elastic.model.pipeline_model_parallel_size=5", "elastic.trainer.devices=5"], r"elastic: "),
        (["import.cluster.partition=a b"], r"import: cluster.partition=a b: write it as letters"),
        (["import.cluster.type=local"], r"import: unknown key 'cluster.type'"),
        (["import.cluster.partitio=cpu"], r"import: unknown key 'cluster.partitio' \(did you mean 'cluster.partition'\?\)"),
        (["elastic.cluster.gpus_per_node=4"], r"elastic: trainer.devices=8 is more than cluster.gpus_per_node=4"),
        (["overwrite=true"], r"overwrite=true: is not for launch"),
        (["cluster.account=''"], r"cluster.account: is empty"),
        (["cluster.gpu.memory=16GB"], r"elastic: needs [\d.]+ GB of each GPU \(weights .* .* it has 16 GB"),
        (["importance.space.attention_unit=auto"], r"attention_unit=auto: a plan needs the sizes .* to kv_group or query_head"),
        (["importance.space.multiple=0"], r"space.multiple=0 must be at least 1"),
        (
            ["importance.space.depth=[0.5,1.0]"],
            r"router: space.depth is elastic, and router chooses heads and neurons only: use gumbel in its place in stages=",
        ),
        (
            ["recipe=llamaflex", "stages=[gumbel,sensitivity]"],
            "space.hidden_size is elastic, and sensitivity measures heads and neurons only: leave sensitivity out of stages=",
        ),
        (
            ["recipe=llamaflex", "stages=[gumbel,compare]", "compare.selectors=[sensitivity]"],
            r"compare: space.hidden_size is elastic, and selector sensitivity .*: set compare.selectors=\[router,uniform,",
        ),
        (["elastic.model.optim.lr=1e-6"], r"elastic: model.optim.min_lr=[\d.e-]+ is above model.optim.lr=1e-06, .*: lower it"),
        (
            ["elastic.model.ddp.overlap_grad_reduce=false", "elastic.model.ddp.overlap_param_gather=true"],
            r"elastic: model.ddp.overlap_param_gather=true needs ",
        ),
        (
            ["importance.model.seq_length=4093", "importance.model.sequence_parallel=true"]
            + ["importance.model.tensor_model_parallel_size=2"],
            r"importance: model.sequence_parallel=true: model.tensor_model_parallel_size=2 does not divide .* 4093: set",
        ),
        (
            ["elastic.model.pipeline_model_parallel_size=4", "elastic.model.virtual_pipeline_model_parallel_size=2"]
            + ["elastic.model.global_batch_size=24", "elastic.num_subnetworks=2"],
            r"elastic: model.virtual_pipeline_model_parallel_size: .* not 18: change",
        ),
        (
            ["elastic.exp_manager.create_mlflow_logger=true"],
            r"elastic: exp_manager.create_mlflow_logger=true: set exp_manager.ml",
        ),
        (
            ["training.exp_manager.create_mlflow_logger=true", "training.exp_manager.mlflow_logger_kwargs.tracking_url=x"],
            r"elastic: exp_manager.mlflow_logger_kwargs.tracking_url: is not known: use experiment_name",
        ),
        (["recipe=llamaflx"], r"recipe=llamaflx is not known \(did you mean 'llamaflex'\?\)"),
        (["cluster.gpu.memory=lots"], r"cluster.gpu.memory=lots: write it as 80GB or 80GiB"),
        (
            ["elastic.model.ddp.use_distributed_optimizer=false", "elastic.model.ddp.overlap_param_gather=false"]
            + ["elastic.model.tensor_model_parallel_size=1", "elastic.model.sequence_parallel=false"],
            r"elastic: needs",
        ),
    ],
)
def test_bad_configurations_are_refused(launch, arguments, message):
    with pytest.raises(FlextronError, match=message) as error:
        config = launch(*BARE, "model=llama2/7b", *arguments)
        planned = plan(config)
        check_configuration(config, planned)
        check_memory(config, planned)
        check_layouts(planned)
    assert "\n" not in str(error.value)


def test_a_layout_for_another_number_of_gpus_can_be_typed(launch):
    layout = "layouts={16: {trainer: {num_nodes: 2, devices: 8}, model: {tensor_model_parallel_size: 4}}}"
    config = launch(*BARE, "model=llama2/7b", "gpus=16", layout)
    planned = plan(config)
    check_configuration(config, planned)
    assert not planned.problems
    assert {job.ranks for job in planned.jobs if job.stage in ("elastic", "router", "joint")} == {16}


def test_a_stage_that_does_not_fit_fits_when_the_remedy_is_typed(launch):
    arguments = [*BARE, "model=llama3/8b", "model.max_position_embeddings=131072", "latency.setting.batch_size=8"]
    config = launch(*arguments, "latency.setting.prompt_length=131072")
    with pytest.raises(
        FlextronError, match=r"latency: needs .* lower latency.setting.batch_size or latency.setting.prompt_length"
    ):
        check_memory(config, plan(config))
    config = launch(*arguments, "latency.setting.prompt_length=4096")
    check_memory(config, plan(config))


@pytest.mark.parametrize(
    "text, value",
    [("30", 1800), ("30:15", 1815), ("04:00:00", 14400), ("1-00:00:00", 86400), ("2-12", 216000), ("1-01:30", 91800)],
)
def test_times_are_slurms(text, value):
    assert seconds(text, "x") == value


def test_further_jobs_are_counted_by_the_time_that_a_training_has(launch):
    """726 hours in jobs of a day: 31 if each trained for the whole day, but each stops before its end."""

    def row(*more: str) -> dict[str, str]:
        return rows(launch(*BARE, "model=llama2/7b", *more))["elastic"]

    whole = row("run.stop_before=00:00:01")
    assert (float(whole["hours"]), whole["jobs"]) == (pytest.approx(725.9, abs=1), "31")
    assert row("run.stop_before=06:00:00")["jobs"] == "41"
    assert row("elastic.trainer.max_time=00:12:00:00")["jobs"] == "61"


def rows(config: LaunchSettings) -> dict[str, dict[str, str]]:
    """{job: {column: cell}} of the table of estimates that `launch` prints."""
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in resources(config, plan(config))[1]}


def test_a_job_costs_the_gpus_that_it_holds(launch):
    """`latency` is one process, but its job holds a whole node."""
    config = launch(*BARE, "model=llama2/7b", "gpu=h200", "cluster.gpu.price=2.5")
    found = rows(config)
    hours = {name: float(found[name]["hours"]) for name in ("elastic", "latency")}
    assert hours["elastic"] == pytest.approx(725.9 * 312 * 0.4 / (989 * 0.27), rel=0.01)
    cost = {name: float(found[name]["cost"].lstrip("$").replace(",", "")) for name in hours}
    assert cost["elastic"] == pytest.approx(hours["elastic"] * 32 * 2.5, abs=1)
    assert cost["latency"] == pytest.approx(hours["latency"] * 8 * 2.5, abs=0.6)
    assert {row["cost"] for row in rows(launch(*BARE, "model=llama2/7b")).values()} == {"-"}


@pytest.mark.parametrize(
    "gpu, figures", [("a100", (80, 312, 0.4)), ("h100", (80, 989, 0.27)), ("h200", (141, 989, 0.27)), ("b200", (180, 2250, 0.2))]
)
def test_a_gpu_has_figures_of_its_own(launch, gpu, figures):
    for cluster in ("bcm", "slurm", "local"):
        config = launch(f"cluster={cluster}", "cluster.account=a", f"gpu={gpu}")
        assert (gpu_memory(config) / 1e9, config.cluster.gpu.peak_tflops, config.cluster.utilisation) == figures
    assert launch("cluster.account=a").cluster.gpu.peak_tflops == 312
    assert launch("cluster.account=a", f"gpu={gpu}", "cluster.utilisation=0.5").cluster.utilisation == 0.5


def test_durations_are_written_as_slurm_reads_them():
    assert clock(86400 + 3 * 3600 + 61) == "01:03:01:01"


@pytest.mark.parametrize(("keys", "length"), [((), 64), (("pretrain.model.seq_length=32",), 32)])
def test_the_record_of_a_training_has_its_tokens(launch, keys, length):
    """`flextron status` computes the hours left from the recorded tokens, also where no key sets the length of a sample."""
    planned = plan(launch(*BARE, "model=smoke", "stages=[pretrain]", "pretrain.model.global_batch_size=8", *keys))
    record = _record(planned, planned.jobs[0], Submitted("pretrain", "7", "/logs"))
    assert (record.tokens, record.samples) == (8 * length, 8 * record.steps)


def test_a_typed_key_of_all_trainings_wins_over_the_recipe(launch):
    typed = ["training.model.global_batch_size=64", "training.model.optim.lr=7e-5", "training.model.tensor_model_parallel_size=4"]
    jobs = {job.name: job.settings for job in plan(launch(*BARE, "model=llama2/7b", *typed, "joint.model.optim.lr=3e-5")).jobs}
    sizes = {(jobs[name].model.global_batch_size, jobs[name].model.tensor_model_parallel_size) for name in ("elastic", "joint")}
    assert sizes == {(64, 4)}
    assert [jobs[name].model.optim.lr for name in ("elastic", "joint")] == [7e-5, 3e-5]
