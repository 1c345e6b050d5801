"""Estimates of memory and FLOPs against measured ones on one rank; tests/parallel/test_estimate.py has several ranks."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from megatron.core.transformer.module import Float16Module
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flextron_mcore import config as flextron_config
from flextron_mcore.choices import Choices
from flextron_mcore.choosing import set_subnetwork, use_subnetwork
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.flops import Costs
from flextron_mcore.launch.activations import networks, saved_chunk, saved_head, saved_layer
from flextron_mcore.launch.estimate import Estimate, estimate
from flextron_mcore.launch.layout import Layout, Rank
from flextron_mcore.launch.speed import HOST, Speed, stage_seconds
from flextron_mcore.layers.block import new_gates
from flextron_mcore.layers.weighted import WeightedNetwork
from flextron_mcore.model import build_model
from flextron_mcore.pipeline.networks import Teaching, run_networks
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.settings.compose import compose
from flextron_mcore.settings.training import StageSettings
from flextron_mcore.space import ElasticSpace, SubNetwork, count_parameters
from tests import memory, toy

LENGTH, BATCH = 128, 2
SIZE = dict(
    num_layers=4, hidden_size=128, num_attention_heads=8, ffn_hidden_size=352, vocab_size=512, max_position_embeddings=LENGTH
)
FAMILIES = {
    "llama": toy.config(**SIZE),
    "llama gqa tied": toy.config(**SIZE, num_query_groups=4, share_embeddings_and_output_weights=True),
    "gpt2": toy.config(**SIZE, **toy.GPT2),
    "gpt2 gqa": toy.config(**SIZE, **toy.GPT2, num_query_groups=4),
    "nemotron": dataclasses.replace(toy.config(**SIZE), activation="squared-relu", normalization="layernorm1p"),
    "minitron": dataclasses.replace(
        toy.config(**SIZE), activation="squared-relu", normalization="layernorm1p", rotary_percent=0.5
    ),
    "mistral": toy.config(**SIZE, num_query_groups=4, sliding_window=50),
    "ministral": toy.config(**SIZE, num_query_groups=4, sliding_window=50, window_attn_skip_freq=(0, 1, 1, 1)),
    "qwen2": toy.config(**SIZE, num_query_groups=4, add_qkv_bias=True),
    "qwen3": toy.config(**SIZE, num_query_groups=4, qk_layernorm=True),
    "smollm3": toy.config(**SIZE, num_query_groups=4, no_rope_freq=(0, 0, 0, 1)),
    "relu": dataclasses.replace(toy.config(**SIZE), activation="relu"),
    "tiny": toy.config(max_position_embeddings=LENGTH),
}
FULL = ["model.recompute_granularity=full", "model.recompute_method=uniform"]
RECOMPUTED = {
    "nothing": [],
    "every layer": [*FULL, "model.recompute_num_layers=1"],
    "two layers": [*FULL, "model.recompute_num_layers=2"],
    "first layer": [FULL[0], "model.recompute_method=block", "model.recompute_num_layers=1"],
    "mlp": ["model.recompute_granularity=selective", "model.recompute_modules=[mlp]"],
}


def configured(stage: str, *keys: str) -> StageSettings:
    given = ["out=o", *([] if stage in ("latency",) else ["data=d"]), *([] if stage == "pretrain" else ["checkpoint=c"])]
    if stage != "latency":
        given += [f"model.micro_batch_size={BATCH}", f"model.seq_length={LENGTH}"]
    if stage in ("pretrain", "elastic", "joint", "router", "gumbel"):
        given += [f"model.global_batch_size={2 * BATCH}"]
    return compose(stage, [*given, *keys])


def said(arch: ModelConfig, config: StageSettings, ranks: int = 1, **more) -> Estimate:
    return estimate(arch, ElasticSpace.build(arch), config, ranks, "fp32", cuda=False, **more)


def built(arch: ModelConfig, config: StageSettings, precision: str = "fp32", frozen: bool = False) -> torch.nn.Module:
    space = ElasticSpace.build(arch, modulation=bool(getattr(config, "modulation", False)))
    model = build_model(arch, space, config.model, precision).train().requires_grad_(not frozen)
    return Float16Module(model.config, model).train() if precision == "bf16" else model


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_activations_are_as_estimated(family, precision):
    arch = FAMILIES[family]
    compare_kept(arch, configured("pretrain", f"trainer.precision={precision}"), precision)


@pytest.mark.parametrize("recomputed", RECOMPUTED)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_kept_activations_with_recomputation_are_as_estimated(family, recomputed):
    compare_kept(FAMILIES[family], configured("pretrain", *RECOMPUTED[recomputed]), "fp32")


def compare_kept(arch: ModelConfig, config: StageSettings, precision: str) -> None:
    model = built(arch, config, precision)
    tokens, positions = (x.contiguous() for x in toy.inputs(BATCH, vocab=arch.vocab_size, length=LENGTH))
    with memory.Kept([*model.parameters(), tokens, positions]) as kept:
        loss = model(tokens, positions, None, labels=tokens)
    rank = Rank(arch, Layout.read(arch, ElasticSpace.build(arch), config, 1, "fp32", cuda=False), 0)
    assert rank.parameters == sum(p.numel() for p in model.parameters()) == count_parameters(arch)
    expected = saved_chunk(rank, arch.num_layers, *saved_layer(rank))[0] + saved_head(rank)
    random_state = 10_000 * arch.num_layers if rank.layout.recompute[0] else 0  # bytes that are kept for each recomputed layer
    assert expected == pytest.approx(kept.now, rel=0.01, abs=random_state)
    assert loss.requires_grad


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gpt2 gqa", "nemotron"])
def test_kept_activations_of_weighted_candidates_are_as_estimated(family, precision):
    arch, config = FAMILIES[family], configured("gumbel", f"trainer.precision={precision}")
    model = built(arch, config, precision)
    set_subnetwork(model, weighted_network(arch))
    tokens, positions = (x.contiguous() for x in toy.inputs(BATCH, vocab=arch.vocab_size, length=LENGTH))
    with memory.Kept([*model.parameters(), tokens, positions]) as kept:
        loss = model(tokens, positions, None, labels=tokens)
    rank = Rank(arch, Layout.read(arch, ElasticSpace.build(arch), config, 1, "fp32", cuda=False), 0)
    expected = saved_chunk(rank, arch.num_layers, *saved_layer(rank, weighted=True))[0] + saved_head(rank, weighted=True)
    assert expected == pytest.approx(kept.now, rel=0.01)
    assert loss.requires_grad


def weighted_network(arch: ModelConfig) -> WeightedNetwork:
    """The full model as a WeightedNetwork: all weight on the largest candidates."""
    space, layers = ElasticSpace.build(arch), arch.num_layers
    widths = [[[0.0] * (len(sizes) - 1) + [1.0]] * layers for sizes in (space.heads, space.ffn_hidden_size)]
    return WeightedNetwork.of([[1.0], [1.0] * layers, *widths, 1.0], torch.device("cpu"))


PEAKS = {
    "pretrain": ("pretrain", [], {}),
    "elastic": ("elastic", [], {"subnets": True}),
    "distillation": ("elastic", ["distillation.weight=0.5"], {"subnets": True, "teach": Teaching(0.5, 2.0)}),
    "frozen teacher": ("elastic", ["distillation.weight=0.5", "teacher=none"], {"subnets": True, "teach": Teaching(0.5, 2.0)}),
    "joint": ("joint", [], {"subnets": True, "straight_through": True}),
    "gumbel": ("gumbel", [], {"subnets": True, "weighted": True}),
    "gumbel, modulated": ("gumbel", ["modulation=true"], {"subnets": True, "weighted": True}),
    "router without surrogate": (
        "router",
        ["surrogate.enabled=false"],
        {"subnets": True, "straight_through": True, "frozen": True},
    ),
    "router": ("router", [], {"subnets": True, "forward_only": True, "frozen": True}),
}


@pytest.mark.parametrize("chunk", [LENGTH, 16])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", PEAKS)
def test_the_peak_of_a_step(stage, precision, chunk, monkeypatch):
    """The estimate is of the largest step, so the sub-networks measured are as large as the full model."""
    if chunk < LENGTH and "teach" not in PEAKS[stage][2]:
        pytest.skip("chunks of other losses are measured by tests/pipeline")
    monkeypatch.setattr(flextron_config, "LOGITS_AT_ONCE", BATCH * 2048 * chunk)
    arch = dataclasses.replace(FAMILIES["llama"], vocab_size=2048)
    name, keys, options = PEAKS[stage]
    config = configured(name, f"trainer.precision={precision}", *keys)
    options = dict(options)
    frozen, straight_through = options.get("frozen", False), options.pop("straight_through", False)
    model = built(arch, config, precision, options.pop("frozen", False))
    if not frozen:
        model = in_ddp(model)
    nets = [None, SubNetwork.full(arch)] if options.pop("subnets", False) else [None]
    nets[1:] = [weighted_network(arch)] if options.pop("weighted", False) else nets[1:]
    if "teacher=none" in keys:
        parent = built(arch, config, precision, frozen=True).eval()
        options["teach"] = dataclasses.replace(options["teach"], parent=[unwrap(parent)])
    gates = [None, *new_gates(1, 2 * arch.num_layers, torch.device("cpu"))] if straight_through else None

    def batches():
        for seed in range(2):
            tokens, positions = toy.inputs(BATCH, seed, arch.vocab_size, LENGTH)
            mask = torch.ones(BATCH, LENGTH)
            yield {"tokens": tokens, "labels": tokens.clone(), "position_ids": positions.contiguous(), "loss_mask": mask}

    def step() -> None:
        run_networks([model], batches, 2, nets, LENGTH, BATCH, gates=gates, **options)

    step()
    peak = memory.peak(step)
    print(f"figure: {stage} {precision} {chunk} {peak} {said(arch, config).activations / peak:.4f}")
    assert said(arch, config).activations == pytest.approx(peak, rel=0.1)


def in_ddp(model: torch.nn.Module) -> torch.nn.Module:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    wrapped.config.finalize_model_grads_func = finalize_model_grads
    return wrapped


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_of_a_step_of_any_family(family, precision):
    """Weights, gradients and the peak of a step; tests/parallel/test_estimate.py measures the optimizer too."""
    arch, config = FAMILIES[family], configured("pretrain", f"trainer.precision={precision}")
    model = in_ddp(built(arch, config, precision))

    def batches():
        for seed in range(2):
            tokens, positions = toy.inputs(BATCH, seed, arch.vocab_size, LENGTH)
            mask = torch.ones(BATCH, LENGTH)
            yield {"tokens": tokens, "labels": tokens.clone(), "position_ids": positions.contiguous(), "loss_mask": mask}

    def step() -> None:
        run_networks([model], batches, 2, [None], LENGTH, BATCH)

    step()
    parameters = list(model.parameters())
    weights, gradients = (sum(memory.storages(each).values()) for each in (parameters, [p.main_grad for p in parameters]))
    expected, peak = said(arch, config), memory.peak(step)
    ratio = (expected.weights + expected.gradients + expected.activations) / (weights + gradients + peak)
    print(f"figure: {family} {precision} {weights + gradients + peak} {ratio:.4f} {expected.activations / peak:.4f}")
    assert ratio == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("width", ["full", "half"])
def test_operations_are_those_that_torch_counts(family, width):
    """Attention is computed by torch's plain kernel, of which torch counts every pair of tokens, those that are masked too."""
    arch = FAMILIES[family]
    space = ElasticSpace.build(arch)
    part = 1 if width == "full" else 2
    heads = arch.num_attention_heads // part
    net = space.uniform(arch, heads, arch.ffn_hidden_size // part)
    model = build_model(arch, space).train()
    tokens, positions = toy.inputs(BATCH, vocab=arch.vocab_size, length=LENGTH)
    with sdpa_kernel(SDPBackend.MATH), use_subnetwork(model, net), FlopCounterMode(display=False) as forward:
        loss = model(tokens, positions, None, labels=tokens)
    with FlopCounterMode(display=False) as backward:
        loss.sum().backward()
    windows = [min(window or LENGTH, LENGTH) for window in arch.windows]
    # mean number of keys that a query sees
    seen = sum(min(i + 1, window) for window in windows for i in range(LENGTH)) / LENGTH / len(windows)
    pair = 4 * arch.num_layers * heads * arch.kv_channels
    estimated = Costs(arch, space, LENGTH).of(net)
    assert forward.get_total_flops() / (BATCH * LENGTH) - (LENGTH - seen) * pair == pytest.approx(estimated, rel=0.01)
    # Products of weights alone to the last one, forward and backward.
    keys = sum(window * (1 - window / (2 * LENGTH)) for window in windows) / len(windows)
    products = BATCH * LENGTH * (estimated - keys * pair)
    pairs = BATCH * LENGTH * LENGTH * pair
    assert forward.get_total_flops() == pytest.approx(products + pairs, rel=1e-6)
    assert backward.get_total_flops() == pytest.approx(2 * (products + pairs), rel=1e-6)
    set_subnetwork(model, None)


def test_the_work_of_the_stages_is_counted():
    arch = FAMILIES["llama"]
    space = ElasticSpace.build(arch)
    costs = Costs(arch, space, LENGTH)
    steps = ["trainer.max_steps=100", "trainer.limit_val_batches=null"]  # validation data are not known, so they are not counted
    tokens = 100 * 2 * BATCH * LENGTH
    pretrain = said(arch, configured("pretrain", *steps))
    assert (pretrain.tokens, pretrain.flops) == (tokens, 3 * tokens * costs.full)
    elastic = said(arch, configured("elastic", *steps))
    assert elastic.tokens == tokens and networks(configured("elastic")) == 4
    assert elastic.flops == pytest.approx(3 * tokens * (costs.full + 3 * costs.drawn()))
    router = said(arch, configured("router", *steps))
    assert router.gradients == router.optimizer == 0
    assert 5 * costs.smallest < router.flops / tokens < 5 * costs.full
    assert said(arch, configured("joint", *steps, "targets_per_step=4")).flops == pytest.approx(3 * router.flops)
    again = said(arch, configured("pretrain", *steps, *RECOMPUTED["every layer"]))
    assert again.flops == pytest.approx(pretrain.flops + tokens * (costs.full - costs.head()))
    # Validation: at the start and every 50 steps; 3 batches of 4 samples of two domains, one of which has 5 samples.
    keys = ["trainer.max_steps=100", "trainer.val_check_interval=50", "trainer.limit_val_batches=3"]
    validated = said(arch, configured("pretrain", *keys), valid_samples=[5, 100])
    assert validated.flops - pretrain.flops == pytest.approx(3 * (5 + 12) * LENGTH * costs.full)
    evaluate = said(arch, configured("evaluate", "limit_val_batches=4"))
    assert evaluate.tokens == 4 * BATCH * LENGTH
    assert evaluate.flops == pytest.approx(
        evaluate.tokens * sum(costs.of(space.uniform(arch, 2 * i, 88 * i)) for i in (1, 2, 3, 4))
    )
    importance = said(arch, configured("importance", "samples=16", "ablation_batches=0"))
    assert (importance.tokens, importance.flops) == (16 * LENGTH, 16 * LENGTH * costs.full)
    sensitivity = said(arch, configured("sensitivity", "limit_val_batches=1"))
    choices, full = Choices(arch, space), SubNetwork.full(arch)
    nets = [full, *(choices.replaced(full, i, k) for i, sizes in enumerate(choices.sizes) for k in range(len(sizes) - 1))]
    assert sensitivity.flops == pytest.approx(sensitivity.tokens * sum(map(costs.of, nets)))
    compare = said(
        arch, configured("compare", "limit_val_batches=1", "random_at_target=0", "selectors=[matformer]", "targets=[0.8]")
    )
    assert compare.flops == pytest.approx(
        compare.tokens * (1.8 * costs.full + sum(costs.of(space.uniform(arch, 8, 88 * i)) for i in (1, 2, 3, 4)))
    )
    latency = said(arch, configured("latency", "rounds=1", "check_networks=2"), ranks=8)
    assert latency.tokens == 2 * (4 + 2) * 2 * LENGTH and latency.weights == 4 * count_parameters(arch)
    assert said(arch, configured("latency", "measurements=file.json")).flops == 0


def test_layers_that_differ_count_on_the_rank_that_holds_them():
    """Activations that the ranks of a pipeline keep add up to those of one rank with all layers, though their windows differ."""
    arch = dataclasses.replace(FAMILIES["ministral"], no_rope_freq=(0, 0, 1, 1))  # a full layer, then three with windows
    space = ElasticSpace.build(arch)

    def kept(pipeline: int, index: int, *keys: str) -> int:
        config = configured("pretrain", f"model.pipeline_model_parallel_size={pipeline}", *keys)
        rank = Rank(arch, Layout.read(arch, space, config, pipeline, "fp32", cuda=False), index)
        return len(rank.numbers) * saved_layer(rank)[0]

    assert kept(2, 0) != kept(2, 1)
    assert kept(2, 0) + kept(2, 1) == pytest.approx(kept(1, 0), rel=1e-6)
    assert sum(kept(4, index) for index in range(4)) == pytest.approx(kept(1, 0), rel=1e-6)
    assert kept(2, 0, "model.virtual_pipeline_model_parallel_size=2") == pytest.approx(kept(4, 0) + kept(4, 2), rel=1e-6)


def test_a_rampup_changes_tokens_time_and_memory():
    """Sizes 2, 4, 6 and 8 by turns of 12 samples: Megatron-LM counts 2 x 4 + 4 x 3 + 6 x 2 and 8 from then on, 20 steps."""
    arch = FAMILIES["llama"]
    keys = ["trainer.max_steps=20", "trainer.limit_val_batches=null", "model.global_batch_size=8", "model.micro_batch_size=1"]
    rampup, whole = [configured("elastic", *keys, *more) for more in (["model.rampup_batch_size=[2,2,36]"], [])]
    consumed, sizes = 0, []
    while len(sizes) < 20:
        sizes.append(2 + consumed // 12 * 2 if consumed <= 36 else 8)
        consumed += sizes[-1]
    assert sizes[:4] == [2] * 4 and sizes[-1] == 8
    assert said(arch, rampup).tokens == LENGTH * sum(sizes)
    assert said(arch, rampup).flops / said(arch, whole).flops == pytest.approx(sum(sizes) / 160)
    # Time: passes of all steps, and a bubble for each step.
    space, two = ElasticSpace.build(arch), ["model.pipeline_model_parallel_size=2"]
    speed = Speed(1e30, 1e30, 1e30, 8)  # so fast that only host time and the bubble count

    def seconds(*more: str) -> float:
        config = configured("elastic", *keys, *two, *more)
        layout = Layout.read(arch, space, config, 2, "fp32", cuda=False)
        return stage_seconds(Costs(arch, space, LENGTH), config, layout, 1.0, speed)

    passes = [4 * size for size in sizes]  # the full model and three sub-networks
    assert seconds("model.rampup_batch_size=[2,2,36]") == pytest.approx(sum(n + 1 for n in passes) * 2 * HOST)
    assert seconds() == pytest.approx(20 * (32 + 1) * 2 * HOST)
    # Memory: as many passes in flight as in the largest step that is reached.
    few = ["trainer.max_steps=3", "num_subnetworks=0", "model.pipeline_model_parallel_size=4", "model.global_batch_size=4"]
    ramped, constant = (
        said(arch, configured("elastic", *few, "model.micro_batch_size=1", *more), 4).activations
        for more in (["model.rampup_batch_size=[1,1,300]"], ["model.global_batch_size=1"])
    )
    assert ramped == constant < said(arch, configured("elastic", *few, "model.micro_batch_size=1"), 4).activations


def four_axes(arch: ModelConfig) -> ElasticSpace:
    return ElasticSpace.build(arch, hidden_size=(0.5, 0.75, 1.0), depth=(0.5, 1.0))


def test_the_work_over_all_axes_is_counted():
    arch = FAMILIES["llama"]
    space = four_axes(arch)
    costs = Costs(arch, space, LENGTH)
    assert costs.smallest == min(costs.of(space.uniform(arch, 2, 88, h, d)) for h in (64, 128) for d in (2, 4))
    made = lambda stage, *keys: estimate(arch, space, configured(stage, *keys), 1, "fp32", cuda=False)  # noqa: E731
    steps = ["trainer.max_steps=100", "trainer.limit_val_batches=null"]
    tokens = 100 * 2 * BATCH * LENGTH
    one, two = (made("gumbel", *steps, "targets_per_step=4", f"router.weighted_per_step={n}") for n in (1, 2))
    sliced = costs.budgeted(None, 1.0, 2 / 3)
    assert one.tokens == tokens and one.flops == pytest.approx(3 * tokens * (2 * costs.full + 3 * sliced))
    assert two.flops == pytest.approx(3 * tokens * (3 * costs.full + 2 * sliced))
    assert one.gradients and one.optimizer and networks(configured("gumbel", "targets_per_step=4")) == 5
    again = made("gumbel", *steps, "targets_per_step=4", *RECOMPUTED["every layer"])
    assert one.flops < again.flops < 4 / 3 * one.flops
    # Scores: the full model on 16 samples. Layers: the full model, and without each of its 4 layers, on 8 samples.
    keys = ("importance", "samples=16", "layer_samples=8", "score.depth=mse")
    importance = made(*keys, "ablation_batches=0")
    three = costs.of(space.network(arch, SubNetwork.full(arch).layers, depth=3))
    assert importance.flops == pytest.approx(LENGTH * (16 * costs.full + 8 * (costs.full + 4 * three)))
    influence = made(*keys[:-1], "ablation_batches=0")
    assert influence.flops == pytest.approx(LENGTH * 16 * costs.full)
    halves = [space.uniform(arch, *sizes) for sizes in ((4, 352), (8, 176), (8, 352, 64), (8, 352, None, 2))]
    for random in (False, True):
        tested = made(*keys, "ablation_batches=1", f"ablation_random={random}".lower())
        table = 2 * costs.full + (2 + random) * sum(map(costs.of, halves))
        assert tested.flops - importance.flops == pytest.approx(BATCH * LENGTH * table)
    assert made("latency", "rounds=1", "check_networks=2").tokens == 2 * (3 * 4 + 2) * 2 * LENGTH


def test_the_work_of_a_family_is_counted():
    arch, costs = FAMILIES["llama"], Costs(FAMILIES["llama"], ElasticSpace.build(FAMILIES["llama"]), LENGTH)
    keys = ["checkpoint=c", "data=d", "out=o", "limit_val_batches=3", f"model.micro_batch_size={BATCH}"]
    config = compose("family", [*keys, "budgets=[0.5,0.25 parameters,25ms]"])
    family = said(arch, config)
    assert (family.tokens, family.flops) == (3 * BATCH * LENGTH, pytest.approx(3 * BATCH * LENGTH * 1.75 * costs.full))
    assert family.weights == 4 * count_parameters(arch) and family.gradients == 0


@pytest.mark.parametrize("axes", ["widths", "all"])
def test_the_expected_cost_of_random_networks_is_their_mean(axes):
    from flextron_mcore.training.sampler import draw

    arch = FAMILIES["llama gqa tied"]
    space = ElasticSpace.build(arch) if axes == "widths" else four_axes(arch)
    costs = Costs(arch, space, LENGTH)
    for mode in ("flextron", "matformer"):
        drawn = [costs.of(net) for step in range(1000) for net in draw(arch, space, 0, step, 3, mode)]
        assert costs.drawn(mode) == pytest.approx(sum(drawn) / len(drawn), rel=0.01)


def test_hours_follow_from_work_and_peak():
    figures = Estimate(1, 2, 3, 4, tokens=10, flops=8 * 1e15 * 0.4 * 3600 * 2.5)
    assert figures.hours(8, 1e15, 0.4) == pytest.approx(2.5)
    assert figures.memory == 10


@pytest.mark.parametrize(
    "ranks, keys, message",
    [
        (3, ["model.tensor_model_parallel_size=2"], "does not divide the 3 rank"),
        (3, ["model.pipeline_model_parallel_size=3"], "does not divide the model's 4 layers"),
        (16, ["model.tensor_model_parallel_size=16"], "does not divide space.granularity=2"),
        (4, [], "model.global_batch_size=4 is not a multiple"),
    ],
)
def test_a_layout_that_does_not_divide_is_one_line(ranks, keys, message):
    with pytest.raises(FlextronError, match=message):
        said(FAMILIES["llama"], configured("pretrain", *keys), ranks)


def test_gpus_keep_less_of_norms_and_parallel_ranks_less_of_everything():
    arch, config = FAMILIES["llama"], configured("pretrain")
    space = ElasticSpace.build(arch)
    one = estimate(arch, space, config, 1, "fp32")
    assert one.activations < said(arch, config).activations
    two = estimate(arch, space, configured("pretrain", "model.tensor_model_parallel_size=2"), 2, "fp32")
    assert all(getattr(two, kind) < getattr(one, kind) for kind in ("weights", "gradients", "optimizer", "activations"))


def test_a_login_node_needs_no_torch():
    code = "import sys, flextron_mcore.launch.estimate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
