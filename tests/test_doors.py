"""Training in other loops (flextron_mcore/doors.py): networks, samples and gradients are those of `flextron elastic`."""

from __future__ import annotations

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from flextron_mcore.config import FlextronError
from flextron_mcore.doors import ElasticTraining, RepeatedMicroBatches, adapt
from flextron_mcore.layers.state import FULL
from flextron_mcore.model import build_model, gpt_model, transformer_config
from flextron_mcore.pipeline.networks import run_networks
from flextron_mcore.space import ElasticSpace
from flextron_mcore.specs import architecture, default_space, elastic_layer, elastic_layer_spec
from tests import toy

ARCH = toy.config()
SPACE = ElasticSpace.build(ARCH)
COUNT, STEP = 3, 5


def batches() -> list[dict[str, torch.Tensor]]:
    """Two micro-batches whose loss masks have different numbers of ones."""
    made = []
    for seed in range(2):
        tokens, positions = toy.inputs(2, seed)
        mask = torch.ones(tokens.shape)
        mask[0, : 5 * seed] = 0
        made.append({"tokens": tokens, "labels": tokens.roll(-1, 1), "position_ids": positions, "loss_mask": mask})
    return made


@pytest.fixture
def model():
    gpt = build_model(ARCH, SPACE)
    gpt.config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(gpt.config, DistributedDataParallelConfig(), gpt)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad_buffer()
    return found


def flush(model, steps, micro_batches: int) -> list[dict]:
    """Run one flush of Megatron-Core's schedule with the forward step `steps`."""
    return get_forward_backward_func()(
        forward_step_func=steps, data_iterator=None, model=model, num_microbatches=micro_batches,
        seq_length=toy.LENGTH, micro_batch_size=2, forward_only=False,
    )  # fmt: skip


def test_both_ways_give_our_gradients_and_losses(model):
    elastic = ElasticTraining(ARCH, SPACE, COUNT, seed=3)
    networks = elastic.networks(STEP)
    assert networks[0] is None and len(set(networks)) > 2
    total = run_networks([model], lambda: iter(batches()), 2, networks, toy.LENGTH, 2)
    wanted, losses = gradients(model), (total[:, 0] / total[:, 1]).tolist()

    repeated = iter([batch for batch in batches() for _ in range(1 + COUNT)])

    def as_micro_batches(_, chunk):
        batch, index = next(repeated), elastic.choose(chunk, STEP, 2 * (1 + COUNT))
        loss = chunk(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
        return loss, lambda output: elastic.loss_function(batch["loss_mask"], [index], True, output)

    once = iter(batches())

    def at_once(_, chunk):
        batch = next(once)
        inputs = {"input_ids": batch["tokens"], "position_ids": batch["position_ids"], "labels": batch["labels"]}
        found = elastic.all_losses(chunk, STEP, {**inputs, "attention_mask": None})
        return found, lambda output: elastic.loss_function(batch["loss_mask"], range(1 + COUNT), True, output)

    for steps, micro_batches in ((as_micro_batches, 2 * (1 + COUNT)), (at_once, 2)):
        reports = flush(model, steps, micro_batches)
        sums = [torch.stack([report[name] for report in reports]).sum(0) for name in elastic.names]
        assert [float(value / tokens) for value, tokens in sums] == pytest.approx(losses, abs=1e-5)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_starts_at_the_full_model_however_the_last_one_ended(model):
    elastic = ElasticTraining(ARCH, SPACE, COUNT, seed=3)
    assert [elastic.choose(model, 0, 8) for _ in range(6)] == [0, 1, 2, 3, 0, 1]
    assert [elastic.choose(model, 1, 8) for _ in range(2)] == [0, 1]
    model.eval()
    assert elastic.choose(model, 1, 8) == 0 and model.module.decoder.layers[0].state is FULL
    model.train()
    assert elastic.choose(model, 1, 8) == 2  # a validation in between does not change whose turn it is
    with pytest.raises(FlextronError, match="6 micro-batches a step cannot be divided among 4 networks"):
        elastic.choose(model, 2, 6)


def test_micro_batches_repeat_in_order():
    repeated = RepeatedMicroBatches(list(range(11)), times=3, size=2)
    assert [repeated[i] for i in range(12)] == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    assert len(repeated) == 30 and repeated[29] == 9


def test_specs_without_a_space_take_the_default():
    config = transformer_config(ARCH)
    adapt(config)
    assert default_space(config) == SPACE and architecture(config).ffn_hidden_size == ARCH.ffn_hidden_size
    block = elastic_layer_spec(config)
    assert isinstance(block, TransformerBlockSubmodules)
    tokens, positions = toy.inputs()
    wanted = build_model(ARCH, SPACE).eval()
    for spec in (block, elastic_layer):
        gpt = gpt_model(ARCH, config, spec).eval()
        gpt.load_state_dict({k: v for k, v in wanted.state_dict().items() if v is not None}, strict=False)
        assert gpt.decoder.layers[1].mlp.space == SPACE
        torch.testing.assert_close(gpt(tokens, positions, None), wanted(tokens, positions, None))
