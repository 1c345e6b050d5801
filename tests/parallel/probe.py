"""Functions that tests call on every rank of a layout (a job of tests/parallel/worker.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer

from flextron_mcore.checkpoint.reader import load_model
from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.layers.attention import ElasticSelfAttention
from flextron_mcore.layers.state import FULL
from flextron_mcore.layers.tokens import attention as token_attention
from flextron_mcore.layers.tokens import levels as token_levels
from flextron_mcore.layers.weighted import WeightedNetwork
from flextron_mcore.model import build_chunks, loaded_model
from flextron_mcore.pipeline.logits import forward_logits
from flextron_mcore.pipeline.networks import run_networks
from flextron_mcore.runs.output import new_output
from flextron_mcore.runtime import distributed
from flextron_mcore.runtime.ranks import wait_for_all
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.settings.stages import ReportSettings
from flextron_mcore.space import ElasticSpace, SubNetwork, parameter_share
from tests import toy
from tests.layers.test_weighted import one_hot, soft
from tests.pipeline.test_networks import batches
from tests.stages.conftest import stage


def logits(checkpoint: str, layout: dict[str, Any], out: str, net: str | None = None, precision: str = "fp32") -> list[int]:
    """Save logits of a checkpoint for fixed tokens to the file OUT.RANK, and return the layers that this rank ran.

    Args:
        checkpoint: path of a checkpoint.
        layout: section `model` of a stage.
        out: path of the files without the rank.
        net: file of a sub-network; None: the full model.
        precision: fp32 or bf16.
    """
    options = LayoutSettings(**layout)
    distributed.initialize(options)
    info = open_checkpoint(checkpoint)
    tokens, _ = toy.inputs(batch=3, vocab=info.model.vocab_size)
    chunks = loaded_model(options, info, precision)
    ran: set[int] = set()
    for module in (module for chunk in chunks for module in chunk.modules() if isinstance(module, ElasticSelfAttention)):
        module.register_forward_hook(lambda attention, *_: ran.add(attention.layer_number - 1))
    torch.save(forward_logits(chunks, SubNetwork.from_file(net) if net else None, tokens), f"{out}.{_rank()}")
    assert all(layer.state is FULL for chunk in chunks for layer in chunk.modules() if hasattr(layer, "mlp"))
    return sorted(ran)


def evaluate_as_on_a_gpu(keys: list[str]) -> None:
    """`flextron evaluate`, with token-routed blocks computed in the way that a GPU uses."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (token_levels, token_attention):
            patch.setattr(module, "waits_are_expensive", lambda x: True)
        stage("evaluate", *keys)


def weighted(checkpoint: str, layout: dict[str, Any], axes: dict[str, Any], net: str) -> dict[str, Any]:
    """Mean losses of four networks in one flush of the pipeline schedule, and gradients of the candidates' weights of two.

    The networks are the full model, one with soft weights of candidates, one with one-hot weights, and the sub-network that
    the one-hot weights select. All blocks are modulated.

    Args:
        checkpoint: path of a checkpoint.
        layout: section `model` of a stage.
        axes: keys of the space that differ from the checkpoint's.
        net: file of the sub-network.

    Returns:
        {"losses": [networks], "gradients": [two networks][axes] flat lists}.
    """
    options = LayoutSettings(**layout)
    distributed.initialize(options)
    info = open_checkpoint(checkpoint)
    space = ElasticSpace.from_dict(info.model, {**info.space.to_dict(), **axes, "modulation": True})
    chunks = build_chunks(info.model, space, options, initialize=False)
    for chunk in chunks:
        load_model(chunk, info)
        with torch.no_grad():
            for layer in (module for module in chunk.modules() if isinstance(module, TransformerLayer)):
                layer.self_attention.modulation.copy_(torch.tensor([0.2 * layer.layer_number, -0.3]))
                layer.mlp.modulation.copy_(torch.tensor([-0.1 * layer.layer_number, 0.4]))
    chosen, device = SubNetwork.from_file(net), distributed.device()
    weights = ([*soft(space, info.model.num_layers), 0.6], [*one_hot(space, chosen), parameter_share(info.model, chosen)])
    pair = [WeightedNetwork.of(part, device) for part in weights]
    ranks = parallel_state.get_data_parallel_world_size()
    mine = batches(4)[parallel_state.get_data_parallel_rank() :: ranks]
    total = run_networks(chunks, lambda: iter(mine), len(mine), [None, *pair, chosen], toy.LENGTH, 2)
    sequence_parallel = options.sequence_parallel
    found = [part.gradients(total[0, 1].item(), sequence_parallel) for part in pair]
    return {
        "losses": (total[:, 0] / total[:, 1]).tolist(),
        "gradients": [[gradient.flatten().tolist() for gradient in part] for part in found],
    }


def chunked_loss(layout: dict[str, Any], tied: bool) -> float:
    """Largest difference of losses and gradients between a loss in one piece and one in chunks, relative to the largest value.

    Args:
        layout: section `model` of a stage.
        tied: True for an output layer that is tied to the embedding.
    """
    options = LayoutSettings(**layout)
    distributed.initialize(options)
    arch = toy.config(num_query_groups=2, share_embeddings_and_output_weights=tied)
    space = ElasticSpace.build(arch, heads=[1.0], hidden_size=[0.5, 1.0], granularity=2)
    networks = [None, toy.random_network(arch, space, 1)]
    found = []
    for chunk in (toy.LENGTH, 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flextron_mcore.config.LOGITS_AT_ONCE", 2 * -(-toy.VOCAB // 2) * chunk)
            torch.manual_seed(1)
            (gpt,) = build_chunks(arch, space, options)
            total = run_networks([gpt], lambda: iter(batches(2)), 2, networks, toy.LENGTH, 2)
            found.append([total[:, 0], *(p.grad for p in gpt.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 5
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*found, strict=True))


def failing_output(out: str, ranks: list[int], fatal: bool) -> None:
    """Write a file into `out` on every rank, then raise on `ranks`: FlextronError, or if `fatal` ValueError."""
    with new_output(ReportSettings(out=out, run="")) as folder:
        (Path(folder) / f"part{_rank()}").write_text("something")
        wait_for_all()
        if _rank() in ranks:
            raise ValueError("fatal") if fatal else FlextronError("bad input")


def _rank() -> int:
    return torch.distributed.get_rank()
