"""Launch of any Hugging Face directory (`model=hf`), and the search for its layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    NemotronConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from flextron_mcore.config import FlextronError
from flextron_mcore.flops import Costs
from flextron_mcore.launch.check import check_configuration, check_layouts
from flextron_mcore.launch.flops import work
from flextron_mcore.launch.layout import Layout
from flextron_mcore.launch.plan import Plan, plan
from flextron_mcore.launch.resources import check_memory, gpu_memory, job_estimate, with_reserve
from flextron_mcore.launch.search import _Search, lay_out
from flextron_mcore.launch.speed import Speed, stage_seconds
from flextron_mcore.space import count_parameters

BARE = ("cluster=slurm", "cluster.account=a", "model=hf")
STAGES = "stages=[import,importance,elastic,router,joint]"
OF_EIGHT = ("importance.space.granularity=8", "importance.space.attention_unit=query_head")
SMALL = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=4)
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SMALL, vocab_size=67, tie_word_embeddings=True),
    "mistral": MistralConfig(**SMALL, sliding_window=16),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=32),
    "smollm3": SmolLM3Config(**SMALL, pad_token_id=0),
    "phi3": Phi3Config(
        **SMALL,
        pad_token_id=0,
        max_position_embeddings=131072,
        rope_scaling={"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    ),
    "nemotron": NemotronConfig(**SMALL),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4),
}


def llama3(folder: Path, **changes: int) -> str:
    """Directory with the config.json of Llama-3-70B alone; returns the key hf=."""
    sizes = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)
    config = LlamaConfig(**{**sizes, "vocab_size": 128256, "max_position_embeddings": 8192, **changes})
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return f"hf={folder}"


LLAMA_405B = dict(num_hidden_layers=126, hidden_size=16384, intermediate_size=53248, num_attention_heads=128)


def laid_out(config) -> Plan:
    planned = lay_out(config, plan(config))[0]
    check_configuration(config, planned)
    check_memory(config, planned)
    check_layouts(planned)
    return planned


@pytest.mark.parametrize("family", CONFIGS)
def test_any_family_is_planned_from_its_config_alone(launch, tmp_path, family):
    """The plan counts as many parameters as transformers builds from the same config.json, which lies there without weights."""
    CONFIGS[family].architectures = None
    CONFIGS[family].save_pretrained(tmp_path / "a model (1)")
    config = launch(*BARE, f"hf={tmp_path}/a model (1)", "gpus=1", STAGES)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(CONFIGS[family])
    planned = laid_out(config)
    assert count_parameters(planned.model) == sum(p.numel() for p in built.parameters())
    assert planned.results.name == "a_model_1_" and planned.jobs[2].settings.model.seq_length is None
    assert planned.jobs[0].settings.hf == str(tmp_path / "a model (1)")


def test_typed_keys_replace_those_of_config_json(launch, tmp_path):
    config = launch(*BARE, llama3(tmp_path / "m"), "gpus=64", "model.num_layers=40", "run.name=mine", "recipe=short")
    assert (config.model.num_layers, config.model.hidden_size, config.run.name) == (40, 8192, "mine")
    assert config.stage_keys["elastic"]["trainer"]["max_steps"] == 8000


@pytest.mark.parametrize(
    "config, message",
    [
        (None, r"model=hf: missing hf=: set it to the directory"),
        (
            {"architectures": ["MixtralForCausalLM"]},
            r"config.json: architecture MixtralForCausalLM is not supported: it has experts",
        ),
        ({"architectures": ["LlamaForCausalLM"], "new_trick": 3}, r"config.json: .*"),
        ([], r"config.json: not a JSON object"),
    ],
)
def test_a_model_that_is_not_supported_is_one_line(launch, tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlextronError, match=message):
        launch(*BARE, "gpus=8", *([f"hf={tmp_path}"] if config is not None else []))


def test_the_layout_is_the_fastest_that_fits(launch, tmp_path):
    """Compared with estimates of every possible layout, made for all its ranks and by other functions than the search's."""
    config = launch(*BARE, llama3(tmp_path / "m", num_hidden_layers=8), "gpus=16", "stages=[elastic]", "cluster.gpu.memory=30GB")
    planned, search = plan(config), _Search(config, plan(config))
    speed, size = Speed.read(config, 8), gpu_memory(config)
    times = {True: [], False: []}
    for keys in search.candidates():
        job = planned.jobs[0]
        job = type(job)(**{**vars(job), "settings": search.settings_of(job, keys)})
        layout = Layout.read(planned.model, planned.space, job.settings, 16, "bf16", cuda=True)
        costs = Costs(planned.model, planned.space, layout.length, layout.tensor)
        flops = work(planned.model, planned.space, job.settings, layout, None).flops
        needed = with_reserve(job_estimate(planned, job).memory)
        times[needed <= size].append(stage_seconds(costs, job.settings, layout, flops, speed))
    assert len(times[True]) > 10 and len(times[False]) > 10
    best, found = search.best()
    chosen = next(row for row in found.rows if row[-1] == "chosen")
    assert search.seconds(planned.jobs[0], best) <= 1.01 * min(times[True])
    assert min(times[False]) < min(times[True])
    assert f"{sum(t < search.seconds(planned.jobs[0], best) for t in times[False])} faster ones do not fit" in found.title
    final = laid_out(config)
    assert float(chosen[7]) == pytest.approx(with_reserve(job_estimate(final, final.jobs[0]).memory) / 1e9, abs=0.06)


def test_keys_that_are_set_are_kept(launch, tmp_path):
    given = {"tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 4, "micro_batch_size": 2}
    keys = [f"training.model.{name}={value}" for name, value in given.items()]
    config = launch(*BARE, llama3(tmp_path / "m"), "gpus=64", STAGES, *OF_EIGHT, *keys, "router.model.micro_batch_size=1")
    jobs = {job.name: job.settings.model for job in laid_out(config).jobs if job.stage != "import"}
    for name, model in jobs.items():
        kept = {key: getattr(model, key) for key in given}
        assert kept == {**given, "micro_batch_size": 1 if name == "router" else 2}
        assert model.sequence_parallel
    free = laid_out(launch(*BARE, llama3(tmp_path / "n"), "gpus=64", STAGES, *OF_EIGHT)).jobs[2].settings.model
    assert (free.tensor_model_parallel_size, free.pipeline_model_parallel_size) != (4, 4)


def test_a_layout_that_is_given_is_not_searched(launch, tmp_path):
    layout = "layouts={64: {trainer: {num_nodes: 8, devices: 8}, model: {pipeline_model_parallel_size: 16, micro_batch_size: 1}}}"
    config = launch(*BARE, llama3(tmp_path / "m"), "gpus=64", "stages=[elastic]", layout)
    planned, found = lay_out(config, plan(config))
    assert found is None and planned.jobs[0].settings.model.pipeline_model_parallel_size == 16


def test_tensor_parallelism_stays_within_a_node(launch, tmp_path):
    config = launch(*BARE, llama3(tmp_path / "m"), "gpus=64", "stages=[elastic]", *OF_EIGHT, "cluster.gpus_per_node=4")
    assert {keys["tensor_model_parallel_size"] for keys in _Search(config, plan(config)).candidates()} == {1, 2, 4}
    job = laid_out(config).jobs[0]
    assert (job.nodes, job.devices) == (16, 4)
    part = launch(
        *BARE, llama3(tmp_path / "n", num_hidden_layers=2), "gpus=3", "stages=[elastic]", "elastic.model.global_batch_size=6"
    )
    job = laid_out(part).jobs[0]
    assert (job.nodes, job.devices, job.settings.model.tensor_model_parallel_size) == (1, 3, 1)


def test_layers_that_cannot_be_divided_leave_the_ends_fewer(launch, tmp_path):
    config = launch(*BARE, llama3(tmp_path / "m", **LLAMA_405B), "gpus=1024", "gpu=h100", STAGES, *OF_EIGHT)
    model = laid_out(config).jobs[2].settings.model
    stages, ends = (
        model.pipeline_model_parallel_size,
        (
            model.num_layers_in_first_pipeline_stage,
            model.num_layers_in_last_pipeline_stage,
        ),
    )
    assert 126 % stages and sum(ends) + (stages - 2) * ((126 - sum(ends)) // (stages - 2)) == 126


def test_too_few_gpus_are_told_how_many_are_enough(launch, tmp_path):
    def searched(gpus: int) -> Plan:
        return laid_out(launch(*BARE, llama3(tmp_path / "m"), f"gpus={gpus}", STAGES))

    with pytest.raises(FlextronError, match=r"gpus=8: no layout fits: joint needs at least .*: use gpus=(\d+)$") as error:
        searched(8)
    enough = int(str(error.value).rpartition("=")[2])
    searched(enough)
    for gpus in range(16, enough, 8):
        with pytest.raises(FlextronError, match="no layout fits|no layout divides"):
            searched(gpus)
    with pytest.raises(FlextronError, match="no number of them is enough: plan for GPUs with more memory with gpu="):
        laid_out(launch(*BARE, llama3(tmp_path / "m"), "gpus=8", STAGES, "cluster.gpu.memory=3GB"))


def test_sizes_that_divide_nothing_are_one_line(launch, tmp_path):
    hf = llama3(tmp_path / "m")
    for keys, message in (
        (["gpus=4", "training.model.tensor_model_parallel_size=3"], r"gpus=4: no layout divides .* leave out keys of the layout"),
        (["gpus=56", "training.model.pipeline_model_parallel_size=1"], r"gpus=56: no layout divides .*global_batch_size=256"),
        (["gpus=12"], "gpus=12: is not a multiple of the 8 GPUs of a node"),
    ):
        with pytest.raises(FlextronError, match=message):
            laid_out(launch(*BARE, hf, STAGES, *keys))


def test_more_tensor_parallelism_needs_a_larger_granularity(launch, tmp_path):
    hf = llama3(tmp_path / "m")
    config = launch(*BARE, hf, "gpus=64", STAGES)
    (note,) = [note for note in lay_out(config, plan(config))[1].notes if note.startswith("TP is at most")]
    words = [word for word in note.replace(";", "").split() if word.startswith("importance.")]
    config = launch(*BARE, hf, "gpus=64", STAGES, *words)
    assert laid_out(config).space.granularity == 8
    assert not any(note.startswith("TP is") for note in lay_out(config, plan(config))[1].notes)


def test_tensor_parallelism_beyond_the_granularity_is_told_how_to_get_it(launch, tmp_path):
    asked = [*BARE, llama3(tmp_path / "m"), "gpus=64", STAGES, "training.model.tensor_model_parallel_size=8"]
    with pytest.raises(FlextronError, match=r"no layout divides .*, or set importance.space.granularity=8 importance") as error:
        laid_out(launch(*asked))
    words = str(error.value).rpartition("or set ")[2].split()
    assert laid_out(launch(*asked, *words)).space.granularity == 8


def test_stages_of_one_process_that_cannot_hold_the_model_say_so(launch, tmp_path):
    hf = llama3(tmp_path / "m")
    for stages, message in (
        ("stages=[import,latency]", "latency: needs .*: latency runs on one GPU: leave latency out of stages="),
        ("stages=[gumbel,family]", "family: needs .*: family runs on one GPU: use export in place of family in stages="),
    ):
        with pytest.raises(FlextronError, match=message):
            laid_out(launch(*BARE, hf, "gpus=64", stages, "data=d"))


def test_slower_messages_take_longer_and_a_bubble_counts(launch, tmp_path):
    config = launch(*BARE, llama3(tmp_path / "m"), "gpus=64", "stages=[elastic]", *OF_EIGHT)
    planned = plan(config)
    search, job = _Search(config, planned), planned.jobs[0]

    def seconds(tensor: int, pipeline: int, chunks: int = 1, **changes: float) -> float:
        keys = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline, "micro_batch_size": 1}
        keys |= {"virtual_pipeline_model_parallel_size": chunks} if chunks > 1 else {}
        search.speed = Speed(**{**vars(Speed.read(config, 8)), "node": math.inf, "network": math.inf, **changes})
        return search.seconds(job, keys)

    whole = seconds(1, 1)
    assert seconds(8, 1) == pytest.approx(whole, rel=1e-3) and seconds(8, 1, node=3e11) > 1.01 * whole
    # 256 samples / 16 ranks x 4 networks = 64 passes: a bubble of 3 / 64, or of half of it with two chunks.
    # The last of four stages has the output layer on top of its layers.
    costs = Costs(planned.model, planned.space, 4096)
    uneven = ((costs.full - costs.head()) / 4 + costs.head()) * 4 / costs.full
    assert seconds(1, 4) / whole == pytest.approx((1 + 3 / 64) * uneven, rel=1e-6)
    assert seconds(1, 4, 2) / whole == pytest.approx((1 + 3 / 128) * uneven, rel=1e-6)
    assert seconds(1, 4, network=25e9) > seconds(1, 4)
