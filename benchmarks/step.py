"""Time of an elastic training step, over the steps of dense models that it replaces, and over a step with masks for slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from tqdm import tqdm

from benchmarks import interleaved, print_settings, ratio
from benchmarks.models import BATCH, DESCRIPTION, GPT2, LENGTH, LLAMA, dense, elastic, forward_backward, micro_batch
from flextron_mcore.config import ModelConfig
from flextron_mcore.pipeline.networks import run_networks
from flextron_mcore.runs.terminal import print_table
from flextron_mcore.runtime import distributed
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.space import ElasticSpace, SubNetwork
from flextron_mcore.training.sampler import draw

DRAWS, ROUNDS = 2, 5


def run() -> None:
    """Run the benchmark and print its table."""
    distributed.initialize()
    print_settings(
        "step: one elastic step (full model + 3 random sub-networks, Adam) / steps of dense models that it replaces",
        DESCRIPTION,
        f"median (quartiles) of {ROUNDS} paired rounds; 'fastest': ratio of the fastest times",
        "elastic: zero gradients, the micro-batch through 4 networks (run_networks), optimizer step",
        "dense: the same step of a full-size dense model, and forward + backward of a dense model of each of the 3 shapes",
        "  (so zeroing, finalizing and the optimizer count once on both sides)",
        "masks: the micro-batch 4 times through the full model, unused neurons and heads multiplied by zero; optimizer step",
    )
    rows = []
    with tqdm(total=2 * DRAWS, desc="step") as bar:
        for name, model in (("llama", LLAMA), ("gpt2", GPT2)):
            space = ElasticSpace.build(model)
            for step in range(DRAWS):
                rows.append([name, step + 1, *_compare(model, space, draw(model, space, seed=1, step=step, count=3))])
                bar.update()
    print_table(
        "step",
        ["model", "draw", "elastic ms", "dense ms", "masks ms", "elastic / dense", "fastest", "elastic / masks"],
        rows,
    )


def _compare(model: ModelConfig, space: ElasticSpace, networks: Sequence[SubNetwork]) -> list[str]:
    """Cells of one row of the table after model and draw. networks: sub-networks of the step, beside the full model."""
    batch = micro_batch(model.vocab_size)
    full = SubNetwork.full(model)
    sliced, masked, whole = elastic(model, space), elastic(model, space), dense(model, full)
    parts = [forward_backward(dense(model, net), batch) for net in networks]
    step_sliced = _elastic_step(sliced, batch, [None, *networks])
    step_whole = _optimizer_step(whole, forward_backward(whole, batch))
    step_masked = _elastic_step(masked, batch, [None])
    pass_masked = forward_backward(masked, batch)

    def separate() -> None:
        for part in parts:
            part()
        step_whole()

    def with_masks() -> None:
        for net in networks:
            _mask(masked, net)
            pass_masked()
        _mask(masked, full)
        step_masked()

    seconds = interleaved({"elastic": step_sliced, "dense": separate, "masks": with_masks}, ROUNDS)
    to_dense, to_masks = (ratio(seconds["elastic"], seconds[other]) for other in ("dense", "masks"))
    milliseconds = [f"{1000 * min(times):.0f}" for times in seconds.values()]
    return [*milliseconds, str(to_dense), f"{to_dense.minima:.3f}", str(to_masks)]


def _elastic_step(
    model: torch.nn.Module, batch: dict[str, torch.Tensor], networks: Sequence[SubNetwork | None]
) -> Callable[[], None]:
    """Function that runs a training step of the micro-batch through `networks`."""
    return _optimizer_step(
        model, lambda: run_networks([model], lambda: iter([batch]), 1, networks, LENGTH, BATCH), scheduled=True
    )


def _optimizer_step(model: torch.nn.Module, passes: Callable[[], object], scheduled: bool = False) -> Callable[[], None]:
    """Function that zeroes gradients, calls `passes` and steps Adam. scheduled: True if `passes` finalizes gradients itself."""
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-4, clip_grad=1.0), [model])
    config = unwrap(model).config
    config.finalize_model_grads_func, config.grad_scale_func = finalize_model_grads, optimizer.scale_loss

    def run() -> None:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        passes()
        if not scheduled:
            finalize_model_grads([model])
        optimizer.step()

    return run


def _mask(model: torch.nn.Module, net: SubNetwork) -> None:
    """Make later passes of the full model multiply by zero the neurons and heads that the sub-network does not use."""
    for layer, choice in zip(unwrap(model).decoder.layers, net.layers, strict=True):
        attention, device = layer.self_attention, distributed.device()
        neurons = (torch.arange(layer.mlp.config.ffn_hidden_size, device=device) < choice.ffn_hidden_size).float()
        heads = torch.zeros(attention.layout.groups, attention.layout.queries, attention.layout.size)
        heads[: choice.kv_groups, : choice.query_heads_per_group] = 1
        layer.mlp.observe = lambda hidden, mask=neurons: hidden * mask
        heads = heads.flatten().to(device)
        attention.linear_proj.observe = lambda hidden, mask=heads: hidden * mask
