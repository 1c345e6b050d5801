"""A step has the gradient of the sum of the networks' mean losses (Flextron, eq. 5), accumulated in slices without padding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from flextron_mcore import config
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.pipeline.networks import Teaching, run_networks
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.memory import peak


def batches(count: int = 2, size: int = 2):
    made = []
    for i in range(count):
        tokens, positions = toy.inputs(size, seed=i, length=toy.LENGTH + 1)
        mask = torch.ones(size, toy.LENGTH)
        mask[0, : 3 * i] = 0  # micro-batches have different numbers of counted tokens
        made.append(
            {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "position_ids": positions[:, :-1]}
        )  # fmt: skip
    return made


def case(kind, unit):
    arch = toy.config(**kind, num_query_groups=2, share_embeddings_and_output_weights=unit == "query_head")
    axes = dict(heads=[0.5, 1.0], hidden_size=[0.5, 1.0], depth=[1, 2], layer_ranking=[1, 0])
    space = ElasticSpace.build(arch, attention_unit=unit, **axes)
    networks = [None, *(toy.random_network(arch, space, seed) for seed in (2, 4, 1))]
    return arch, space, networks


def wrapped(model):
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False), model
    )
    model.config.finalize_model_grads_func = finalize_model_grads
    ddp.zero_grad_buffer()
    return ddp


def cross_entropy(logits, batch):
    loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return (loss * batch["loss_mask"].flatten()).sum()


@pytest.mark.parametrize("chunk", [None, 5, 1], ids=["one piece", "chunks of 5 positions", "chunks of 1"])
@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("kind", [toy.LLAMA, toy.GPT2], ids=["llama", "gpt2"])
def test_gradient_is_that_of_the_summed_losses(kind, unit, chunk, monkeypatch):
    """A loss in chunks of the sequence has the same gradient."""
    monkeypatch.setattr(config, "LOGITS_AT_ONCE", 2 * toy.VOCAB * chunk if chunk else config.LOGITS_AT_ONCE)
    arch, space, networks = case(kind, unit)
    reference, model = toy.model(arch, space), toy.model(arch, space)
    tokens = sum(batch["loss_mask"].sum() for batch in batches())
    sums = []
    assert len({net.hidden_size for net in networks[1:]}) == len({net.layers[0].executed for net in networks[1:]}) == 2
    for net in networks:
        with use_subnetwork(reference, net):
            loss = sum(cross_entropy(reference(b["tokens"], b["position_ids"], None), b) for b in batches())
        (loss / tokens).backward()
        sums.append(loss.item())
    total = run_networks([ddp := wrapped(model)], lambda: iter(batches()), 2, networks, toy.LENGTH, 2)
    torch.testing.assert_close(total[:, 0], torch.tensor(sums, dtype=torch.float64), rtol=1e-5, atol=1e-4)
    assert total[:, 1].tolist() == [tokens.item()] * 4
    for (name, p), q in zip(reference.named_parameters(), ddp.module.parameters(), strict=True):
        torch.testing.assert_close(q.main_grad, p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert q.grad is None or not q.grad.requires_grad


def test_chunks_bound_the_memory_of_the_loss(monkeypatch):
    """With a loss in chunks, the peak of a forward and backward pass has one chunk's logits in place of all, at an equal loss."""
    arch = toy.config(vocab_size=30_000, max_position_embeddings=256)
    model = toy.model(arch, ElasticSpace.build(arch))
    tokens, positions = toy.inputs(2, vocab=arch.vocab_size, length=256)
    losses, peaks = [], []
    for chunk in (256, 16):
        monkeypatch.setattr(config, "LOGITS_AT_ONCE", 2 * arch.vocab_size * chunk)
        model(tokens, positions, None, labels=tokens).sum().backward()  # allocates the gradients
        peaks.append(peak(lambda: losses.append(model(tokens, positions, None, labels=tokens).sum().backward())))
        with torch.no_grad():
            losses.append(model(tokens, positions, None, labels=tokens))
    torch.testing.assert_close(losses[1], losses[3], rtol=1e-6, atol=1e-5)
    assert peaks[0] - peaks[1] > 0.8 * 4 * 2 * 240 * arch.vocab_size


def test_slices_accumulate_in_place_and_leave_the_rest_alone():
    arch = toy.config()
    space = ElasticSpace.build(arch)
    model = toy.model(arch, space)
    ddp = wrapped(model)
    for p in ddp.module.parameters():
        p.main_grad.fill_(7.0)
    small = space.uniform(arch, 1, 12)
    run_networks([ddp], lambda: iter(batches(1)), 1, [small], toy.LENGTH, 2)
    # finalize_model_grads divides all gradients by the number of tokens
    untouched = 7.0 / batches(1)[0]["loss_mask"].sum()
    fc2 = model.decoder.layers[0].mlp.linear_fc2.weight.main_grad
    assert (fc2[:, 12:] == untouched).all() and (fc2[:, :12] != untouched).all()
    fc1 = model.decoder.layers[0].mlp.linear_fc1.weight.main_grad.view(2, 48, -1)
    assert (fc1[:, 12:] == untouched).all() and (fc1[:, :12] != untouched).all()
    qkv = model.decoder.layers[1].self_attention.linear_qkv.weight.main_grad
    assert (qkv[3 * 8 :] == untouched).all() and (qkv[: 3 * 8] != untouched).all()


@pytest.mark.parametrize("chunk", [None, 5], ids=["one piece", "chunks of 5 positions"])
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("frozen", [False, True], ids=["in place", "frozen teacher"])
def test_distillation_is_the_divergence_of_plain_softmaxes(frozen, size, chunk, monkeypatch):
    """The full model teaches the sub-networks of its step, or a frozen model with fewer layers teaches them all."""
    monkeypatch.setattr(config, "LOGITS_AT_ONCE", size * toy.VOCAB * chunk if chunk else config.LOGITS_AT_ONCE)
    arch, space, networks = case(toy.LLAMA, "kv_group")
    parent = None
    if frozen:
        smaller = toy.config(**toy.LLAMA, num_query_groups=2, num_layers=1)
        parent = toy.model(smaller, ElasticSpace.build(smaller)).eval().requires_grad_(False)
    teach = Teaching(weight=0.3, temperature=2.0, parent=parent and [parent])
    reference, model = toy.model(arch, space), toy.model(arch, space)
    tokens = sum(batch["loss_mask"].sum() for batch in batches(2, size))
    divergences = torch.zeros(len(networks))
    for batch in batches(2, size):
        given = batch["tokens"], batch["position_ids"], None
        with torch.no_grad():
            teacher = torch.softmax((parent or reference)(*given) / 2.0, -1)
        for j, net in enumerate(networks):
            with use_subnetwork(reference, net):
                student = reference(*given)
            divergence = (teacher * (teacher.log() - torch.log_softmax(student / 2.0, -1))).sum(-1)
            divergence = 4.0 * (divergence * batch["loss_mask"]).sum()
            loss = cross_entropy(student, batch)
            if frozen or net is not None:
                divergences[j] += divergence.detach()
                loss = 0.7 * loss + 0.3 * divergence
            ((0.5 * loss if net is None else loss) / tokens).backward()
    ddp = wrapped(model)
    total = run_networks([ddp], lambda: iter(batches(2, size)), 2, networks, toy.LENGTH, size, teach=teach, full_weight=0.5)
    torch.testing.assert_close(total[:, 2].float(), divergences, rtol=1e-4, atol=1e-4)
    assert (divergences[0 if frozen else 1 :] > 1e-3).all() and total[:, 1].tolist() == [tokens.item()] * 4
    for p, q in zip(reference.parameters(), ddp.module.parameters(), strict=True):
        torch.testing.assert_close(q.main_grad, p.grad, rtol=1e-4, atol=1e-5)


def test_adam_updates_units_that_no_network_of_a_step_used():
    """Unused units have gradient zero: Adam applies weight decay and remaining momentum. The full model uses all units."""
    arch = toy.config()
    space = ElasticSpace.build(arch)
    ddp = wrapped(toy.model(arch, space))
    config = OptimizerConfig(optimizer="adam", lr=0.01, weight_decay=0.1, clip_grad=0.0, adam_beta1=0.9, adam_beta2=0.95)
    optimizer = get_megatron_optimizer(config, [ddp])

    def step(networks):
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        run_networks([ddp], lambda: iter(batches(1)), 1, networks, toy.LENGTH, 2)
        before = weight.detach().clone()
        optimizer.step()
        return before

    weight = ddp.module.decoder.layers[0].mlp.linear_fc2.weight
    small = [space.uniform(arch, 1, 12)]
    before = step(small)  # never used so far: only weight decay
    torch.testing.assert_close(weight[:, 12:], before[:, 12:] * (1 - 0.01 * 0.1))
    assert not torch.allclose(weight[:, :12], before[:, :12] * (1 - 0.01 * 0.1))
    step([None, *small])
    assert (weight.main_grad != 0).all()  # the full model reaches every unit
    state = optimizer.optimizer.state[weight]
    mean, square = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    before = step(small)  # used in an earlier step: momentum remains and fades
    torch.testing.assert_close(state["exp_avg"][:, 12:], mean[:, 12:] * 0.9)
    update = (mean * 0.9 / (1 - 0.9**3)) / ((square * 0.95 / (1 - 0.95**3)).sqrt() + 1e-8)
    torch.testing.assert_close(weight[:, 12:], (before * (1 - 0.01 * 0.1) - 0.01 * update)[:, 12:], rtol=1e-5, atol=1e-6)
