"""Importance scores of eq. 3 and 4, and sorting by them, which does not change the model's function."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flextron_mcore.checkpoint.reader import load_model
from flextron_mcore.checkpoint.store import CheckpointInfo, iteration_path, open_checkpoint
from flextron_mcore.checkpoint.writer import write_streaming
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.config import FlextronError
from flextron_mcore.model import build_model
from flextron_mcore.sorting.importance import LayerScores, collect, importance
from flextron_mcore.sorting.permutation import order, sorted_tensors
from flextron_mcore.space import ElasticSpace
from tests import toy

CASES = {
    "llama mha": (toy.LLAMA, 4, "kv_group"),
    "gpt2 groups": (toy.GPT2, 2, "kv_group"),
    "llama query heads": (toy.LLAMA, 2, "query_head"),
    "gpt2 query heads": (toy.GPT2, 1, "query_head"),
}


def case(name):
    kind, groups, unit = CASES[name]
    arch = toy.config(**kind, num_query_groups=groups)
    space = ElasticSpace.build(arch, attention_unit=unit, heads=[0.5, 1.0], modulation=name == "gpt2 groups")
    return arch, space, toy.model(arch, space)


def batches(count=3):
    for i in range(count):
        tokens, positions = toy.inputs(seed=i)
        yield {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(tokens.shape), "position_ids": positions}


def scored(model, score="activation", count=3, space=None):
    scores = {"heads": score, "ffn_hidden_size": score}
    found = importance([model], lambda: batches(count), count, toy.LENGTH, 2, space, scores)
    return collect(found, model.config.num_layers).layers


def head_outputs(model, count: int = 3) -> list[torch.Tensor]:
    """Inputs of the output projection of each layer on all tokens [T, heads * H], float64, from forward hooks."""
    seen = [[] for _ in model.decoder.layers]
    handles = [
        layer.self_attention.linear_proj.register_forward_pre_hook(lambda _, args, x=x: x.append(args[0].flatten(0, 1).double()))
        for layer, x in zip(model.decoder.layers, seen, strict=True)
    ]
    with torch.no_grad():
        for batch in batches(count):
            model(batch["tokens"], batch["position_ids"], None)
    for handle in handles:
        handle.remove()
    return [torch.cat(x) for x in seen]


@pytest.mark.parametrize("name", CASES)
def test_head_scores_are_equation_3(name):
    arch, space, model = case(name)
    shape = (arch.num_query_groups, arch.query_heads_per_group, arch.kv_channels)
    for (i, layer), outputs in zip(scored(model).items(), head_outputs(model), strict=True):
        expected = outputs.abs().sum(0).view(shape).sum(2)
        expected = expected.sum(1) if space.attention_unit == "kv_group" else expected
        torch.testing.assert_close(layer.units["heads"], expected, rtol=1e-5, atol=1e-4, msg=f"layer {i}")


@pytest.mark.parametrize("name", CASES)
def test_energy_is_the_squared_norm_of_what_a_unit_adds(name):
    """Energy of a group is |W_g o_g|^2, with products of different heads, computed here from the outputs themselves."""
    arch, space, model = case(name)
    sizes = arch.num_query_groups if space.attention_unit == "kv_group" else arch.num_attention_heads
    found = scored(model, "energy")
    for layer, scores, outputs in zip(model.decoder.layers, found.values(), head_outputs(model), strict=True):
        weight = layer.self_attention.linear_proj.weight.detach().double()
        parts = zip(weight.chunk(sizes, 1), outputs.chunk(sizes, 1), strict=True)
        expected = torch.stack([(part @ columns.T).square().sum() for columns, part in parts])
        torch.testing.assert_close(scores.units["heads"].flatten(), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(scores.units["ffn_hidden_size"], torch.stack(energies(model, layer)), rtol=1e-5, atol=0)


def energies(model, layer) -> list[torch.Tensor]:
    """Energy of each neuron of a layer: the squares of fc2's input on all tokens, times that of the neuron's column."""
    inputs: list[torch.Tensor] = []
    handle = layer.mlp.linear_fc2.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1).double()))
    head_outputs(model)
    handle.remove()
    hidden, columns = torch.cat(inputs), layer.mlp.linear_fc2.weight.detach().double()
    return [torch.outer(hidden[:, i], columns[:, i]).square().sum() for i in range(hidden.shape[1])]


def test_neuron_scores_are_equation_4():
    arch, _, model = case("gpt2 groups")
    mlp = model.decoder.layers[0].mlp
    inputs = []
    handle = mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0].detach()))
    scores = scored(model)[0].units["ffn_hidden_size"]
    handle.remove()
    x = torch.cat([i.flatten(0, 1) for i in inputs])
    hidden = torch.nn.functional.gelu(x @ mlp.linear_fc1.weight.T + mlp.linear_fc1.bias, approximate="tanh")
    torch.testing.assert_close(scores, hidden.abs().sum(0).double(), rtol=1e-5, atol=1e-3)


def test_tokens_that_do_not_count_are_not_scored():
    _, _, model = case("gpt2 groups")

    def halves():
        for batch in batches():
            mask = torch.ones(batch["tokens"].shape)
            mask[1] = 0
            yield {**batch, "loss_mask": mask}

    def first_rows():
        for batch in batches():
            yield {name: tensor[:1] for name, tensor in batch.items()}

    masked = importance([model], halves, 3, toy.LENGTH, 2).layers
    expected = importance([model], first_rows, 3, toy.LENGTH, 1).layers
    for i, layer in expected.items():
        torch.testing.assert_close(masked[i].units["ffn_hidden_size"], layer.units["ffn_hidden_size"], rtol=1e-6, atol=0)
        torch.testing.assert_close(masked[i].units["heads"], layer.units["heads"], rtol=1e-6, atol=0)


def test_the_weighted_score_multiplies_by_the_norm_of_what_follows():
    arch, _, model = case("llama mha")
    plain, weighted = scored(model), scored(model, "activation_weight")
    layer = model.decoder.layers[1]
    torch.testing.assert_close(
        weighted[1].units["ffn_hidden_size"], plain[1].units["ffn_hidden_size"] * layer.mlp.linear_fc2.weight.norm(dim=0)
    )
    blocks = layer.self_attention.linear_proj.weight.view(arch.hidden_size, 4, 8)
    torch.testing.assert_close(weighted[1].units["heads"], plain[1].units["heads"] * blocks.square().sum((0, 2)).sqrt())


def test_scoring_leaves_the_model_as_it_was():
    _, _, model = case("llama mha")
    scored(model)
    layer = model.decoder.layers[0]
    assert "observe" not in vars(layer.mlp) and "observe" not in vars(layer.self_attention.linear_proj)
    with pytest.raises(FlextronError, match="score of heads: 'magnitude' is not known"):
        scored(model, "magnitude")


def sort(arch, space, model, scores, tmp_path, new_space=None):
    """Write the model, sort its checkpoint from disk to disk, and load the result. new_space: space to sort for."""
    info = CheckpointInfo(arch, space)
    info = open_checkpoint(toy.write(model, info, tmp_path / "first"))
    space = new_space or space
    second = iteration_path(tmp_path / "second", 0)
    second.mkdir(parents=True)
    orders = {i: order(arch, space, s) for i, s in scores.items()}
    write_streaming(second, replace(info, space=space, sorted=True), sorted_tensors(info, orders))
    after = build_model(arch, space, initialize=False).eval()
    load_model(after, open_checkpoint(second))
    return after


@pytest.mark.parametrize("name", CASES)
def test_sorting_keeps_the_function_and_orders_by_importance(name, tmp_path):
    arch, space, model = case(name)
    scores = scored(model)
    after = sort(arch, space, model, scores, tmp_path)
    tokens, positions = toy.inputs(seed=9)
    with torch.no_grad():
        torch.testing.assert_close(after(tokens, positions, None), model(tokens, positions, None), atol=1e-5, rtol=0)
    changed = False
    for i, again in scored(after).items():
        assert (again.units["ffn_hidden_size"].diff() <= 1e-3).all()
        torch.testing.assert_close(
            again.units["ffn_hidden_size"], scores[i].units["ffn_hidden_size"].sort(descending=True).values, rtol=1e-5, atol=1e-3
        )
        assert (again.units["heads"].diff(dim=-1) <= 1e-3).all()
        changed |= not torch.equal(scores[i].units["ffn_hidden_size"], again.units["ffn_hidden_size"])
    assert changed
    kept = [parameter for key, parameter in after.named_parameters() if key.endswith("modulation")]
    given = [parameter for key, parameter in model.named_parameters() if key.endswith("modulation")]
    assert len(kept) == 4 * space.modulation and all(map(torch.equal, kept, given))


def test_sorted_half_keeps_the_most_important_neurons(tmp_path):
    """The half-width network of the sorted model has the logits of the original with its less important half masked."""
    arch, space, model = case("llama mha")
    scores = scored(model)
    after = sort(arch, space, model, scores, tmp_path)
    for i, layer in enumerate(model.decoder.layers):
        keep = torch.zeros(arch.ffn_hidden_size)
        keep[scores[i].units["ffn_hidden_size"].argsort(descending=True)[:24]] = 1
        layer.mlp.observe = lambda hidden, keep=keep: hidden * keep
    tokens, positions = toy.inputs()
    with torch.no_grad(), use_subnetwork(after, space.uniform(arch, 4, 24)):
        torch.testing.assert_close(after(tokens, positions, None), model(tokens, positions, None), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [toy.LLAMA, toy.GPT2], ids=["llama", "gpt2"])
def test_sorting_channels_keeps_the_function_and_orders_them_by_importance(kind, tied, tmp_path):
    """Channels have one order in all tensors; the narrow network keeps the most important, by norm outputs summed here."""
    arch = toy.config(**kind, share_embeddings_and_output_weights=tied)
    space = ElasticSpace.build(arch, hidden_size=[0.5, 1.0])
    model = toy.model(arch, space)

    def found(of) -> torch.Tensor:
        return importance([of], lambda: batches(3), 3, toy.LENGTH, 2).channels

    seen = torch.zeros(arch.hidden_size, dtype=torch.float64)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.RMSNorm | torch.nn.LayerNorm)]

    squares = torch.zeros_like(seen)

    def add(module, args, out) -> None:
        seen.add_(out.abs().double().sum((0, 1)))
        squares.add_(out.double().square().sum((0, 1)))

    handles = [norm.register_forward_hook(add) for norm in norms]
    with torch.no_grad():
        for batch in batches():
            model(batch["tokens"], batch["position_ids"], None)
    for handle in handles:
        handle.remove()
    scores = found(model)
    torch.testing.assert_close(scores, seen, rtol=1e-5, atol=1e-3)
    energy = importance([model], lambda: batches(3), 3, toy.LENGTH, 2, None, {"hidden_size": "energy"}).channels
    torch.testing.assert_close(energy, squares, rtol=1e-5, atol=0)
    info = open_checkpoint(toy.write(model, CheckpointInfo(arch, space), tmp_path / "first"))
    folder = iteration_path(tmp_path / "second", 0)
    folder.mkdir(parents=True)
    orders = {i: order(arch, space, layer) for i, layer in scored(model).items()}
    channels = scores.argsort(descending=True, stable=True)
    write_streaming(folder, replace(info, sorted=True), sorted_tensors(info, orders, channels))
    after = build_model(arch, space, initialize=False).eval()
    load_model(after, open_checkpoint(folder))
    tokens, positions = toy.inputs(seed=9)
    with torch.no_grad():
        torch.testing.assert_close(after(tokens, positions, None), model(tokens, positions, None), atol=1e-5, rtol=0)
    torch.testing.assert_close(found(after), scores.sort(descending=True).values, rtol=1e-5, atol=1e-3)
    assert channels.tolist() != list(range(arch.hidden_size))


def test_sorting_for_another_space(tmp_path):
    arch, space, model = case("llama query heads")
    other = ElasticSpace.build(arch, granularity=2, attention_unit="kv_group", heads=[1.0])
    after = sort(arch, space, model, scored(model, space=other), tmp_path, other)
    tokens, positions = toy.inputs()
    with torch.no_grad():
        torch.testing.assert_close(after(tokens, positions, None), model(tokens, positions, None), atol=1e-5, rtol=0)


def test_ties_keep_their_order():
    arch, space, _ = case("llama mha")
    tied = LayerScores({"ffn_hidden_size": torch.ones(48, dtype=torch.float64), "heads": torch.ones(4, dtype=torch.float64)})
    found = order(arch, space, tied)
    assert found["ffn_hidden_size"].tolist() == list(range(48)) and found["kv_groups"].tolist() == list(range(4))
