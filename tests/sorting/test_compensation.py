"""Compensation of query heads: construction, and sorting with it, against least squares over the activations themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flextron_mcore.checkpoint.reader import TensorReader, load_model
from flextron_mcore.checkpoint.store import CheckpointInfo, iteration_path, open_checkpoint
from flextron_mcore.checkpoint.writer import write_streaming
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.exports.cut import cut
from flextron_mcore.flops import Costs
from flextron_mcore.layers.compensation import folded
from flextron_mcore.model import build_model
from flextron_mcore.sorting.compensation import HeadCompensation, fold_model, head_compensation, second_moments, unfolded
from flextron_mcore.sorting.importance import LayerScores, collect, importance
from flextron_mcore.sorting.permutation import order, sorted_tensors
from flextron_mcore.space import ElasticSpace, SubNetwork
from tests import toy
from tests.sorting.test_importance import batches, head_outputs


def eliminated(heads_TQH: np.ndarray, weight_CQH: np.ndarray) -> tuple[list[int], dict[int, np.ndarray], list[float]]:
    """Order of heads, the weights {k: [C, Q, H]} when k heads are left, and the errors of the removals, by numpy's lstsq."""
    weight, left, weights, removed, errors = weight_CQH.copy(), list(range(weight_CQH.shape[1])), {}, [], []
    while len(left) > 1:
        weights[len(left)] = weight.copy()
        fits = []
        for head in left:
            others = [j for j in left if j != head]
            outputs = np.einsum("ch,tqh->tcq", weight[:, head], heads_TQH).reshape(-1, weight.shape[1])
            scalars = np.linalg.lstsq(outputs[:, others], outputs[:, head], rcond=None)[0]
            fits.append((np.square(outputs[:, head] - outputs[:, others] @ scalars).sum(), head, others, scalars))
        error, head, others, scalars = min(fits, key=lambda fit: fit[0])
        for other, scalar in zip(others, scalars, strict=True):
            weight[:, other] += scalar * weight[:, head]
        left.remove(head)
        removed.append(head)
        errors.append(error)
    weights[1] = weight
    return [*left, *reversed(removed)], weights, errors


def test_it_is_least_squares_of_one_head_after_the_other():
    """Order, errors and weights equal least squares, head by head, for every number of heads kept of two groups of five."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(50, 2, 1, 2, 8, generator=generator, dtype=torch.float64)
    heads = torch.randn(50, 2, 2, 5, 8, generator=generator, dtype=torch.float64)
    heads[:, :, :, 1:4] += shared.movedim(2, 3) * torch.tensor([0.5, -2.0, 1.5], dtype=torch.float64)[:, None]
    weight = torch.randn(24, 2, 5, 8, generator=generator, dtype=torch.float64)
    counted = (torch.rand(50, 2, 1, generator=generator) < 0.8).double()
    found = head_compensation(weight, second_moments(heads, counted))
    permuted = weight.gather(2, found.order_GQ[None, :, :, None].expand_as(weight))
    stored = unfolded(permuted, found.matrix_GQQ)
    assert torch.equal(found.matrix_GQQ.triu(), torch.eye(5, dtype=torch.float64).expand(2, 5, 5))
    torch.testing.assert_close(folded(stored, found.matrix_GQQ), permuted, rtol=0, atol=1e-12)
    for group in range(2):
        outputs = heads[counted.squeeze(-1) == 1][:, group].numpy()
        ranked, weights, errors = eliminated(outputs, weight[:, group].numpy())
        assert found.order_GQ[group].tolist() == ranked
        np.testing.assert_allclose(found.errors_GQ[group][ranked[:0:-1]], np.cumsum(errors), rtol=1e-5)
        for count in range(1, 6):
            prefix = folded(stored[:, group, :count][:, None], found.matrix_GQQ[group, :count, :count][None])[:, 0]
            np.testing.assert_allclose(prefix, weights[count][:, ranked[:count]], rtol=0, atol=2e-5)


def test_equal_heads_are_one_head():
    """A head that equals another costs nothing, and the equations without a unique solution are solved."""
    heads = torch.randn(40, 1, 1, 3, 4, generator=torch.Generator().manual_seed(2))
    heads[..., 2, :] = heads[..., 0, :]
    heads[..., 1, :] = 0
    weight = torch.randn(6, 1, 3, 4, generator=torch.Generator().manual_seed(3))
    found = head_compensation(weight, second_moments(heads, torch.ones(40, 1, 1)))
    first, *rest = found.order_GQ[0].tolist()
    assert first in (0, 2) and found.matrix_GQQ.isfinite().all()
    assert found.errors_GQ[0, rest].max() < 1e-5 * found.errors_GQ[0, first]
    weights = folded(unfolded(weight.double()[:, :, found.order_GQ[0]], found.matrix_GQQ)[:, :, :1], found.matrix_GQQ[:, :1, :1])
    torch.testing.assert_close(weights[:, 0, 0], (weight[:, 0, 0] + weight[:, 0, 2]).double(), rtol=0, atol=1e-5)


KINDS = {"llama": (toy.LLAMA, 2), "gpt2": (toy.GPT2, 1)}


class Sorted:
    """A toy model of 8 heads, and its checkpoint sorted with and without compensation, in the same order."""

    def __init__(self, kind: str, root) -> None:
        keys, groups = KINDS[kind]
        self.arch = toy.config(**keys, num_attention_heads=8, num_query_groups=groups)
        self.space = ElasticSpace.build(
            self.arch, attention_unit="query_head", heads=[groups * n for n in range(1, 8 // groups + 1)]
        )
        self.model, self.root = toy.model(self.arch, self.space), root
        found = importance([self.model], lambda: batches(6), 6, toy.LENGTH, 2, self.space, {"heads": "compensated"})
        self.scores = collect(found, 2).layers
        self.given = open_checkpoint(toy.write(self.model, CheckpointInfo(self.arch, self.space), root / "given"))
        self.orders = {i: order(self.arch, self.space, layer) for i, layer in self.scores.items()}
        self.matrices = {i: layer.compensation.matrix_GQQ for i, layer in self.scores.items()}
        self.plain, self.compensated = self.write(self.given, {}, "plain"), self.write(self.given, self.matrices, "compensated")

    def write(
        self, info: CheckpointInfo, matrices: dict[int, torch.Tensor], name: str, orders=None, dtype="fp32"
    ) -> CheckpointInfo:
        folder = iteration_path(self.root / name, 0)
        folder.mkdir(parents=True)
        described = replace(info, space=replace(self.space, compensation=bool(matrices)), sorted=True)
        write_streaming(folder, described, sorted_tensors(info, orders or self.orders, None, matrices))
        return open_checkpoint(folder)

    def load(self, info: CheckpointInfo) -> torch.nn.Module:
        model = build_model(self.arch, info.space, initialize=False).eval()
        load_model(model, info)
        return model


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory) -> Sorted:
    return Sorted(request.param, tmp_path_factory.mktemp("compensated"))


def logits(model: torch.nn.Module, net: SubNetwork | None = None, seed: int = 99) -> torch.Tensor:
    with torch.no_grad(), use_subnetwork(model, net):
        return model(*toy.inputs(seed=seed, batch=16), None)


def test_the_full_model_is_unchanged(made):
    torch.testing.assert_close(logits(made.load(made.compensated)), logits(made.model), atol=1e-5, rtol=0)
    keys = TensorReader(made.compensated).keys()
    assert (
        sum(key.endswith("compensation") for key in keys)
        == made.arch.num_layers
        == len(keys) - len(TensorReader(made.plain).keys())
    )


def test_the_full_model_is_unchanged_to_rounding_in_float64(made):
    plain = made.load(made.plain).double()
    model = build_model(made.arch, made.compensated.space).eval().double()
    state = plain.state_dict()
    for number, matrix in made.matrices.items():
        key = f"decoder.layers.{number}.self_attention.linear_proj."
        heads = (*matrix.shape[:2], made.arch.kv_channels)
        state[f"{key}weight"] = unfolded(state[f"{key}weight"].unflatten(1, heads), matrix).flatten(1)
        state[f"{key}compensation"] = matrix
    model.load_state_dict(state)
    expected = logits(plain)
    assert (logits(model) - expected).abs().max() < 1e-12 * expected.abs().max()
    fold_model([model])
    assert (logits(model) - expected).abs().max() < 1e-12 * expected.abs().max()
    assert model.decoder.layers[0].self_attention.linear_proj.compensation is None


def test_every_narrower_network_is_nearer_to_the_full_model_than_without(made):
    """Cross-entropy against the full model's probabilities, on tokens that were not seen, with the same order of heads."""
    plain, compensated = made.load(made.plain), made.load(made.compensated)
    wanted = logits(made.model).softmax(-1)

    def loss(model: torch.nn.Module, heads: int) -> float:
        found = logits(model, made.space.uniform(made.arch, heads)).log_softmax(-1)
        return (wanted * (wanted.log() - found)).sum(-1).mean().item()

    for heads in made.space.heads[:-1]:
        assert loss(compensated, heads) < 0.9 * loss(plain, heads), heads


def test_the_weights_that_follow_absorb_the_rounding_of_the_matrix(made):
    """In bf16, stored weight times matrix differs from the exact weight only by the rounding of the stored weight."""
    model = toy.model(made.arch, made.space).bfloat16()
    half = open_checkpoint(toy.write(model, replace(made.given, dtype="bf16", path=None), made.root / "given16"))
    reader = TensorReader(made.write(half, made.matrices, "compensated16"))
    plain = TensorReader(made.write(half, {}, "plain16"))
    for number in range(made.arch.num_layers):
        key = f"decoder.layers.{number}.self_attention.linear_proj."
        weight, matrix, expected = reader.read(f"{key}weight"), reader.read(f"{key}compensation"), plain.read(f"{key}weight")
        assert weight.dtype == matrix.dtype == torch.bfloat16
        heads, matrix = weight.double().unflatten(1, (*matrix.shape[:2], -1)), matrix.double()
        rounding = folded(heads.abs(), matrix.abs()) * 2**-8  # bf16 has 8 bits
        assert ((folded(heads, matrix) - expected.double().view_as(heads)).abs() <= rounding * 1.001).all()


def test_sorting_again_starts_from_the_weights_without_compensation(made):
    """A compensated checkpoint that is sorted again, with or without compensation, is what sorting the original gives."""
    same = {
        i: {"query_heads_per_group": torch.arange(8 // made.arch.num_query_groups).repeat(made.arch.num_query_groups, 1)}
        for i in (0, 1)
    }
    for matrices, name in (({}, "plain"), (made.matrices, "compensated")):
        again = TensorReader(made.write(made.compensated, matrices, f"{name} again", same))
        expected = TensorReader(getattr(made, name))
        assert set(again.keys()) == set(expected.keys())
        for key in again.keys():
            torch.testing.assert_close(again.read(key), expected.read(key), atol=1e-5, rtol=0, msg=key)


def test_its_products_are_counted(made):
    """FLOPs of the forward pass beyond those without compensation, by torch's own count."""
    for heads in made.space.heads:
        net, counted = made.space.uniform(made.arch, heads), []
        for info in (made.compensated, made.plain):
            model = made.load(info).requires_grad_(False)
            with FlopCounterMode(display=False) as counter:
                logits(model, net)
            counted.append(counter.get_total_flops())
        expected = [Costs(made.arch, info.space, toy.LENGTH).of(net) for info in (made.compensated, made.plain)]
        assert counted[0] - counted[1] == (expected[0] - expected[1]) * 16 * toy.LENGTH
        assert counted[0] > counted[1] or heads == made.arch.num_query_groups


def test_a_cut_network_has_the_weights_of_least_squares(made):
    """Every number of heads, against the inputs of the output projection in float64, on the tokens that count."""
    groups = made.arch.num_query_groups
    for number, (layer, outputs) in enumerate(zip(made.model.decoder.layers, head_outputs_of(made), strict=True)):
        weight = layer.self_attention.linear_proj.weight.detach().double().unflatten(1, (groups, 8 // groups, -1))
        expected = [eliminated(outputs[:, group].numpy(), weight[:, group].numpy())[:2] for group in range(groups)]
        for heads in made.space.heads:
            tensors, count = cut(made.compensated, made.space.uniform(made.arch, heads)), heads // groups
            found = tensors[f"decoder.layers.{number}.self_attention.linear_proj.weight"].load()
            wanted = [weights[count][:, ranked[:count]] for ranked, weights in expected]
            np.testing.assert_allclose(found.unflatten(1, (groups, count, -1)), np.stack(wanted, 1), rtol=0, atol=1e-4)


def test_ties_have_the_order_of_the_matrix(made):
    """Heads whose scores are all 0 keep the order that the compensation matrix was computed for."""
    shape = (made.arch.num_query_groups, 8 // made.arch.num_query_groups)
    reverse = torch.arange(shape[1]).flip(0).expand(shape)
    units = {"heads": torch.zeros(shape), "ffn_hidden_size": torch.zeros(48)}
    found = order(made.arch, made.space, LayerScores(units, 0.0, HeadCompensation(reverse, torch.zeros(0), units["heads"])))
    assert torch.equal(found["query_heads_per_group"], reverse)


def head_outputs_of(made: Sorted) -> list[torch.Tensor]:
    """Outputs of the heads of each layer on the calibration tokens [T, G, Q, H], float64."""
    groups = made.arch.num_query_groups
    return [outputs.unflatten(1, (groups, 8 // groups, -1)) for outputs in head_outputs(made.model, 6)]
