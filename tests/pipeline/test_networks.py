"""Eq. 5: the gradient of a step is that of the sum of the networks' mean losses, accumulated without zero-padded gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

from flextron_mcore.model import build_model, use_subnetwork
from flextron_mcore.pipeline.networks import Distillation, run_networks
from flextron_mcore.space import ElasticSpace
from tests import toy


def batches(count: int = 2):
    made = []
    for i in range(count):
        tokens, positions = toy.inputs(seed=i, length=toy.LENGTH + 1)
        mask = torch.ones(2, toy.LENGTH)
        mask[0, : 3 * i] = 0  # micro-batches with different numbers of tokens
        made.append(
            {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "position_ids": positions[:, :-1]}
        )  # fmt: skip
    return made


def case(kind, unit):
    arch = toy.config(**kind, num_query_groups=2)
    space = ElasticSpace.build(arch, attention_unit=unit, heads=[0.5, 1.0])
    networks = [None, *(toy.random_network(arch, space, seed) for seed in range(3))]
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


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("kind", [toy.LLAMA, toy.GPT2], ids=["llama", "gpt2"])
def test_gradient_is_that_of_the_summed_losses(kind, unit):
    arch, space, networks = case(kind, unit)
    reference, model = toy.model(arch, space), toy.model(arch, space)
    tokens = sum(batch["loss_mask"].sum() for batch in batches())
    sums = []
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


def test_slices_accumulate_in_place_and_leave_the_rest_alone():
    arch = toy.config()
    space = ElasticSpace.build(arch)
    model = toy.model(arch, space)
    ddp = wrapped(model)
    for p in ddp.module.parameters():
        p.main_grad.fill_(7.0)
    small = space.uniform(arch, 1, 12)
    run_networks([ddp], lambda: iter(batches(1)), 1, [small], toy.LENGTH, 2)
    # finalize divides everything by the number of tokens
    untouched = 7.0 / batches(1)[0]["loss_mask"].sum()
    fc2 = model.decoder.layers[0].mlp.linear_fc2.weight.main_grad
    assert (fc2[:, 12:] == untouched).all() and (fc2[:, :12] != untouched).all()
    fc1 = model.decoder.layers[0].mlp.linear_fc1.weight.main_grad.view(2, 48, -1)
    assert (fc1[:, 12:] == untouched).all() and (fc1[:, :12] != untouched).all()
    qkv = model.decoder.layers[1].self_attention.linear_qkv.weight.main_grad
    assert (qkv[3 * 8 :] == untouched).all() and (qkv[: 3 * 8] != untouched).all()


def test_distillation_teaches_the_subnetworks_and_not_the_full_model():
    arch, space, networks = case(toy.LLAMA, "kv_group")
    teach = Distillation(weight=0.3, temperature=2.0)
    reference, model = toy.model(arch, space), toy.model(arch, space)
    tokens = sum(batch["loss_mask"].sum() for batch in batches())
    for batch in batches():
        logits = reference(batch["tokens"], batch["position_ids"], None)
        (cross_entropy(logits, batch) / tokens).backward()
        teacher = torch.softmax(logits.detach() / 2.0, -1)
        for net in networks[1:]:
            with use_subnetwork(reference, net):
                student = reference(batch["tokens"], batch["position_ids"], None)
            divergence = (teacher * (teacher.log() - torch.log_softmax(student / 2.0, -1))).sum(-1)
            loss = 0.7 * cross_entropy(student, batch) + 0.3 * 4.0 * (divergence * batch["loss_mask"]).sum()
            (loss / tokens).backward()
    run_networks([ddp := wrapped(model)], lambda: iter(batches()), 2, networks, toy.LENGTH, 2, teach=teach)
    for p, q in zip(reference.parameters(), ddp.module.parameters(), strict=True):
        torch.testing.assert_close(q.main_grad, p.grad, rtol=1e-4, atol=1e-5)


def test_full_recomputation_changes_nothing():
    arch, space, networks = case(toy.LLAMA, "kv_group")
    gradients = []
    for recompute in ({}, dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)):
        torch.manual_seed(3)
        model = build_model(arch, space, **recompute).train()
        total = run_networks([ddp := wrapped(model)], lambda: iter(batches()), 2, networks, toy.LENGTH, 2)
        gradients.append([total, *(p.main_grad.clone() for p in ddp.module.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7, check_dtype=True)
