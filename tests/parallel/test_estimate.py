"""Memory estimates of launch/estimate.py against ranks that train: stored tensors, and the peak of a step."""

from __future__ import annotations

import pytest

from flextron_mcore.config import ModelConfig
from flextron_mcore.launch.activations import in_flight, saved_chunk, saved_head, saved_layer
from flextron_mcore.launch.estimate import estimate, memory_of
from flextron_mcore.launch.layout import Layout, Rank
from flextron_mcore.settings.compose import compose
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.parallel.worker import chosen, run_jobs
from tests.stages.conftest import stage

VOCABULARY = 1001  # odd, so tensor-parallel ranks pad it
SIZE = dict(num_layers=4, hidden_size=96, num_attention_heads=16, ffn_hidden_size=256, vocab_size=VOCABULARY)
LLAMA = toy.config(**SIZE, num_query_groups=8, max_position_embeddings=64)
TIED = toy.config(**SIZE, max_position_embeddings=64, share_embeddings_and_output_weights=True)
GPT2 = toy.config(**SIZE, **toy.GPT2, max_position_embeddings=64)
BF16, DISTRIBUTED = "trainer.precision=bf16", "model.ddp.use_distributed_optimizer=true"
TP2, PP2 = "model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=2"
SEQUENCE, VIRTUAL = "model.sequence_parallel=true", "model.virtual_pipeline_model_parallel_size=2"
FULL = ["model.recompute_granularity=full", "model.recompute_method=uniform", "model.recompute_num_layers=1"]
LAYOUTS: dict[str, tuple[int, ModelConfig, list[str]]] = {
    "one": (1, LLAMA, []),
    "one bf16 tied": (1, TIED, [BF16]),
    "TP2 SP": (2, LLAMA, [TP2, SEQUENCE]),
    "TP2 gpt2 bf16": (2, GPT2, [TP2, BF16]),
    "PP2 tied": (2, TIED, [PP2]),
    "PP2 uneven gpt2": (2, GPT2, [PP2, "model.num_layers_in_first_pipeline_stage=1"]),
    "PP2 virtual": (2, LLAMA, [PP2, VIRTUAL]),
    "PP2 full recomputation": (2, LLAMA, [PP2, *FULL]),
    "DP2": (2, LLAMA, []),
    "DP2 distributed optimizer": (2, LLAMA, [DISTRIBUTED]),
    "DP2 distributed optimizer bf16": (2, GPT2, [DISTRIBUTED, BF16]),
    "TP2 PP2 SP bf16": (4, LLAMA, [TP2, PP2, SEQUENCE, BF16]),
    "TP2 PP2 tied": (4, TIED, [TP2, PP2]),
}
SHORT = ("one", "one bf16 tied", "TP2 SP", "PP2 tied", "PP2 virtual", "PP2 full recomputation", "DP2")
SHORT += ("DP2 distributed optimizer bf16", "PP2 uneven gpt2")
LAYOUTS = chosen(LAYOUTS, SHORT)
KEYS = ["model.micro_batch_size=4", "model.global_batch_size=32", "trainer.max_steps=4", "trainer.val_check_interval=100"]
KEYS += ["exp_manager.create_tensorboard_logger=false"]


@pytest.fixture(scope="module")
def held(tmp_path_factory, text):
    """{layout: for each rank, the bytes of tests.memory.training}."""
    root = tmp_path_factory.mktemp("estimate")
    stage("prepare", f"input=[{text}/code,{text}/prose]", "vocab_size=300", "valid_fraction=0.2", f"out={root}/data")
    found = {}
    for processes in (1, 2, 4):
        names = [name for name, (count, *_) in LAYOUTS.items() if count == processes]
        jobs = [
            {
                "call": "tests.memory:training",
                "arguments": {
                    "arch": LAYOUTS[name][1].to_dict(),
                    "data": f"{root}/data",
                    "out": f"{root}/{name.replace(' ', '_')}",
                    "keys": [*KEYS, *LAYOUTS[name][2]],
                },
            }
            for name in names
        ]
        for name, job in zip(names, run_jobs(processes, jobs, tmp_path_factory.mktemp("jobs")), strict=True):
            assert all("result" in rank for rank in job), job
            found[name] = [rank["result"] for rank in job]
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_memory_is_that_of_the_ranks(held, name):
    processes, arch, keys = LAYOUTS[name]
    config = compose("pretrain", ["data=d", "out=o", *KEYS, *keys])
    space = ElasticSpace.build(arch, granularity=2)
    layout = Layout.read(arch, space, config, processes, "fp32", cuda=False)
    ranks = [Rank(arch, layout, index) for index in range(layout.pipeline)]
    micro_batches = config.model.global_batch_size // (layout.micro_batch * layout.data)
    order = [0] if layout.pipeline == 1 else [0, processes // 2]  # rank order: pipeline is the outermost dimension
    totals = []
    for rank, found in zip(ranks, [held[name][i + (layout.tensor - 1)] for i in order], strict=True):
        weights, gradients, optimizer, activations = memory_of(rank, config)
        assert weights == pytest.approx(found["weights"], rel=0.005)
        assert gradients == pytest.approx(found["gradients"], rel=0.005)
        assert optimizer == pytest.approx(found["optimizer"], rel=0.005)
        assert kept(rank, micro_batches) == pytest.approx(found["kept"], rel=0.02)
        if found["activations"] is not None:  # None where tests/memory.py cannot measure it
            assert activations == pytest.approx(found["activations"], rel=0.08)
        totals.append(weights + gradients + optimizer + activations)
        measured = found["weights"] + found["gradients"] + found["optimizer"] + (found["activations"] or found["kept"])
        total = totals[-1] if found["activations"] else totals[-1] - activations + kept(rank, micro_batches)
        print(f"figure: {name} rank {rank.index} {measured} {total / measured:.4f}")
        assert total == pytest.approx(measured, rel=0.05)
    assert estimate(arch, space, config, processes, "fp32", cuda=False).memory == max(totals)


def kept(rank: Rank, micro_batches: int) -> int:
    """Estimated peak of what autograd keeps: the forward passes in flight, and the loss's part or a recomputed layer."""
    chunk, again = saved_chunk(rank, rank.layout.layers[rank.index] // rank.layout.chunks, *saved_layer(rank))
    return in_flight(rank, micro_batches) * chunk + max(again, saved_head(rank) if rank.last else 0)


def test_compared_figures_differ(held):
    """Guard: the compared figures differ between layouts and between the ranks of a pipeline, so equality means something."""
    totals = [rank["weights"] + rank["kept"] for ranks in held.values() for rank in ranks]
    assert max(totals) > 2 * min(totals)
    first, last = (rank["kept"] for rank in held["PP2 uneven gpt2"])
    assert abs(first - last) > 0.1 * max(first, last)
    peaks = [name for name, ranks in held.items() if any(rank["activations"] is not None for rank in ranks)]
    assert {"one", "one bf16 tied", "DP2", "PP2 tied", "PP2 virtual"} <= set(peaks)
