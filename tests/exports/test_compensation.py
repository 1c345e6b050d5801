"""Refitted projections are those of NumPy's least squares over activations taken from transformers' model in fp64."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from flextron_mcore.axes import FFN_HIDDEN_SIZE, HEADS
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.exports import compensation
from flextron_mcore.exports.compensation import RIDGE, install, moment_bytes, narrowed, passes, refit
from flextron_mcore.exports.formats import Job, get_format
from flextron_mcore.settings.formats import HfSettings
from flextron_mcore.space import SKIPPED, SubNetwork
from tests import hf_toy

COUNT, SIZE = 6, 2
DEEP = {"hidden_size": [0.5, 1.0], "depth": [2, 3], "ffn_hidden_size": [0.5, 1.0]}
GROUPS, QUERIES = {**DEEP, "attention_unit": "kv_group"}, {**DEEP, "attention_unit": "query_head"}
BIASES = dict(num_hidden_layers=3, attention_bias=True, mlp_bias=True)
CASES = {
    "llama, groups": (hf_toy.llama, dict(num_hidden_layers=3), GROUPS),
    "llama, query heads": (hf_toy.llama, dict(num_hidden_layers=3), QUERIES),
    "llama, biases": (hf_toy.llama, BIASES, GROUPS),
    "gpt2": (hf_toy.gpt2, dict(n_layer=3), GROUPS),
}


def batches(count: int = COUNT):
    """Micro-batches of tokens, of which a third does not count."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        tokens = torch.randint(0, hf_toy.VOCAB, (SIZE, hf_toy.LENGTH), generator=generator)
        mask = (torch.rand(tokens.shape, generator=generator) > 1 / 3).float()
        positions = torch.arange(hf_toy.LENGTH).expand_as(tokens)
        yield {"tokens": tokens, "labels": tokens, "loss_mask": mask, "position_ids": positions}


def refitted(model, net, most_bytes=float("inf")):
    parts = passes([model], net, most_bytes)
    return refit([model], net, parts, batches, COUNT, hf_toy.LENGTH, SIZE)


@dataclass
class Toy:
    """Random model of transformers, its checkpoint, and networks of it."""

    theirs: torch.nn.Module
    info: CheckpointInfo

    @classmethod
    def of(cls, case, folder):
        make, options, space = CASES[case]
        theirs = make(**options)
        info = hf_toy.checkpoint(hf_toy.save(theirs, folder / "hf"), folder / "run", space)
        assert info.space.granularity > 1  # so units are not in sorted order on disk
        return cls(theirs, info)

    def networks(self) -> dict[str, SubNetwork]:
        arch, space = self.info.model, self.info.space
        heads, neurons = arch.num_attention_heads, arch.ffn_hidden_size
        small, wide = space.layer_choice(arch, heads // 2, neurons // 2), space.layer_choice(arch, heads, neurons // 2)
        mixed = (small, SKIPPED, wide) if 1 not in space.layer_ranking[:2] else (small, wide, SKIPPED)
        return {
            "heads": space.uniform(arch, heads // 2, neurons),
            "neurons": space.uniform(arch, heads, neurons // 2),
            "all axes, by layer": SubNetwork(arch.hidden_size // 2, mixed),
        }

    def projections(self, model, layer) -> list[torch.nn.Module]:
        """Output projection and fc2 of a layer of transformers' model."""
        if isinstance(model, GPT2LMHeadModel):
            return [model.transformer.h[layer].attn.c_proj, model.transformer.h[layer].mlp.c_proj]
        return [model.model.layers[layer].self_attn.o_proj, model.model.layers[layer].mlp.down_proj]

    def weight(self, projection) -> torch.Tensor:
        """Weight [out, in] of a projection, as a view."""
        return projection.weight.T if isinstance(self.theirs, GPT2LMHeadModel) else projection.weight

    def columns(self, choice) -> list[list[int]]:
        """Inputs of output projection and fc2 that a layer keeps, in transformers' order of heads."""
        arch, kept = self.info.model, []
        for head in range(arch.num_attention_heads):
            group, number = divmod(head, arch.query_heads_per_group)
            if group < choice.kv_groups and number < choice.query_heads_per_group:
                kept += range(head * arch.kv_channels, (head + 1) * arch.kv_channels)
        return [kept, list(range(choice.ffn_hidden_size))]

    def activations(self) -> dict[tuple[int, int], np.ndarray]:
        """{(layer, 0 for the output projection and 1 for fc2): its inputs on all counted tokens [tokens, units], fp64}."""
        model, found, mask = hf_toy.double(copy.deepcopy(self.theirs)), {}, []
        for layer in range(self.info.model.num_layers):
            for kind, module in enumerate(self.projections(model, layer)):
                rows = found[layer, kind] = []
                module.register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0][mask[-1]].numpy()))
        with torch.no_grad():
            for batch in batches():
                mask.append(batch["loss_mask"] > 0)
                model(batch["tokens"])
        return {key: np.concatenate(rows) for key, rows in found.items()}


def least_squares(inputs: np.ndarray, outputs: np.ndarray, plain: np.ndarray, intercept: bool) -> tuple[np.ndarray, np.ndarray]:
    """(weight [out, kept], bias [out]) with the least squared error, and RIDGE as additional rows that pull it to `plain`."""
    offset, target = (inputs.mean(0), outputs.mean(0)) if intercept else (0, 0)
    ridge = np.diag(np.sqrt(RIDGE * ((inputs - offset) ** 2).sum(0)))
    rows, wanted = np.concatenate([inputs - offset, ridge]), np.concatenate([outputs - target, ridge @ plain.T])
    weight = np.linalg.lstsq(rows, wanted, rcond=None)[0].T
    return weight, target - weight @ offset if intercept else np.zeros(len(weight))


@pytest.mark.parametrize("case", CASES)
def test_refitted_projections_are_the_least_squares(case, tmp_path):
    toy = Toy.of(case, tmp_path)
    model, seen = hf_toy.megatron(toy.info), toy.activations()
    for name, net in toy.networks().items():
        found, tokens = refitted(model, net)
        assert tokens == len(seen[0, 0])
        expected = set()
        for layer, choice in enumerate(net.layers):
            for kind, projection in enumerate(toy.projections(toy.theirs, layer)):
                kept, inputs = toy.columns(choice)[kind] if choice.executed else [], seen[layer, kind]
                if not choice.executed or len(kept) == inputs.shape[1]:
                    continue
                weight = toy.weight(projection).detach().double().numpy()[: net.hidden_size]
                biased = projection.bias is not None
                bias = projection.bias.detach().double().numpy()[: net.hidden_size] if biased else 0
                wanted = inputs @ weight.T + bias
                best, offset = least_squares(inputs[:, kept], wanted, weight[:, kept], biased)
                key = f"decoder.layers.{layer}." + ("self_attention.linear_proj", "mlp.linear_fc2")[kind]
                np.testing.assert_allclose(found[f"{key}.weight"].numpy(), best, atol=2e-4, err_msg=f"{name}: {key}")
                expected.add(f"{key}.weight")
                if biased:
                    np.testing.assert_allclose(found[f"{key}.bias"].numpy(), offset, atol=2e-4, err_msg=f"{name}: {key}")
                    expected.add(f"{key}.bias")
                # The ridge costs next to nothing, and the plain slice is far from the optimum.
                rows = np.concatenate([inputs[:, kept], np.ones((len(inputs), int(biased)))], 1)
                least = np.square(wanted - rows @ np.linalg.lstsq(rows, wanted, rcond=None)[0]).sum()
                made = np.square(wanted - inputs[:, kept] @ best.T - offset).sum()
                plain = np.square(wanted - inputs[:, kept] @ weight[:, kept].T - bias).sum()
                assert made <= 1.001 * least and least < 0.9 * plain
        assert set(found) == expected


@pytest.mark.parametrize("case", CASES)
def test_the_export_has_the_refitted_weights_and_their_logits(case, tmp_path):
    """Compared with transformers' original, whose projections get the refitted columns and zeros in place of removed units."""
    toy = Toy.of(case, tmp_path)
    for number, (name, net) in enumerate(toy.networks().items()):
        model = hf_toy.megatron(toy.info)
        found, _ = refitted(model, net)
        original = copy.deepcopy(toy.theirs)
        with torch.no_grad():
            for layer, choice in enumerate(net.layers):
                for kind, projection in enumerate(toy.projections(original, layer)):
                    key = f"decoder.layers.{layer}." + ("self_attention.linear_proj", "mlp.linear_fc2")[kind]
                    if f"{key}.weight" in found:
                        columns = torch.tensor(toy.columns(choice)[kind])
                        toy.weight(projection)[: net.hidden_size, columns] = found[f"{key}.weight"]
                    if f"{key}.bias" in found:
                        projection.bias[: net.hidden_size] = found[f"{key}.bias"]
        expected = hf_toy.logits(hf_toy.masked(original, toy.info.model, net))
        plain = hf_toy.logits(hf_toy.masked(toy.theirs, toy.info.model, net))
        assert (expected - plain).abs().max() > 0.1
        out = tmp_path / str(number)
        out.mkdir()
        job = Job(toy.info, net, out, refitted=found, refit="4 projections refitted", settings=HfSettings())
        get_format("hf").write(job)
        assert "| compensated | 4 projections refitted |" in (out / "README.md").read_text()
        torch.testing.assert_close(hf_toy.logits(hf_toy.load(out)), expected, atol=hf_toy.ATOL, rtol=0, msg=name)
        # The model in Megatron-Core that `export` compares the directory with.
        install([model], net, found)
        torch.testing.assert_close(hf_toy.logits(model, net), expected, atol=hf_toy.ATOL, rtol=0, msg=name)


@pytest.mark.parametrize("format_", ["megatron", "trtllm", "gguf"])
def test_other_formats_have_the_refitted_weights(format_, tmp_path):
    if format_ == "gguf":
        pytest.importorskip("gguf")
    toy = Toy.of("llama, groups", tmp_path)
    model, net = hf_toy.megatron(toy.info), toy.networks()["all axes, by layer"]
    found, _ = refitted(model, net)
    (tmp_path / "out").mkdir()
    job = Job(toy.info, net, tmp_path / "out", refitted=found, refit="refitted here")
    written = get_format(format_)
    written.write(job)
    install([model], net, found)
    tokens = hf_toy.tokens()
    expected = hf_toy.logits(model, net)
    torch.testing.assert_close(written.logits(job, net, tokens), expected, atol=1e-4, rtol=0)
    assert any("refitted here" in file.read_text() for file in (tmp_path / "out").rglob("*.md")) or format_ == "gguf"


def test_several_passes_give_the_tensors_of_one(tmp_path):
    toy = Toy.of("llama, groups", tmp_path)
    model, net = hf_toy.megatron(toy.info), toy.networks()["neurons"]
    layer = moment_bytes(toy.info.model, net, 1)[0]
    assert [passes([model], net, most) for most in (1, layer, 2 * layer, 3 * layer)] == [
        [[0], [1], [2]],
        [[0], [1], [2]],
        [[0, 1], [2]],
        [[0, 1, 2]],
    ]
    (one, tokens), (several, again) = refitted(model, net), refitted(model, net, 1)
    assert tokens == again and one.keys() == several.keys() and all(torch.equal(one[key], several[key]) for key in one)


@pytest.mark.parametrize("case", CASES)
def test_moments_have_the_bytes_that_are_counted(case, tmp_path, monkeypatch):
    toy = Toy.of(case, tmp_path)
    model, net = hf_toy.megatron(toy.info), toy.networks()["all axes, by layer"]
    seen = []
    start = compensation._Block.start
    monkeypatch.setattr(compensation._Block, "start", lambda block: (start(block), seen.append(block.moments_Uk.nbytes)))
    refitted(model, net)
    assert sum(seen) == sum(moment_bytes(toy.info.model, net, 1).values()) > 0


def test_only_blocks_with_fewer_units_are_refitted(tmp_path):
    toy = Toy.of("llama, groups", tmp_path)
    arch, space = toy.info.model, toy.info.space
    assert not narrowed(arch, SubNetwork.full(arch))
    wide = space.layer_choice(arch, arch.num_attention_heads, arch.ffn_hidden_size)
    assert not narrowed(arch, space.network(arch, [wide] * 3, arch.hidden_size // 2, 2))
    assert narrowed(arch, toy.networks()["neurons"]) == [(layer, FFN_HIDDEN_SIZE) for layer in range(3)]
    assert narrowed(arch, toy.networks()["heads"]) == [(layer, HEADS) for layer in range(3)]


def test_units_that_are_never_active_stay_as_they_are(tmp_path):
    toy = Toy.of("llama, groups", tmp_path)
    model, net = hf_toy.megatron(toy.info), toy.networks()["neurons"]
    with torch.no_grad():
        for layer in model.decoder.layers:
            layer.mlp.linear_fc1.weight[:3] = 0
    found, _ = refitted(model, net)
    layer = model.decoder.layers[0].mlp.linear_fc2.weight
    torch.testing.assert_close(found["decoder.layers.0.mlp.linear_fc2.weight"][:, :3], layer[:, :3], atol=1e-6, rtol=0)


def test_activations_that_are_not_finite_are_refused(tmp_path):
    toy = Toy.of("llama, groups", tmp_path)
    model, net = hf_toy.megatron(toy.info), toy.networks()["neurons"]
    with torch.no_grad():
        model.decoder.layers[1].mlp.linear_fc1.weight[0] = torch.inf
    with pytest.raises(
        FlextronError, match=r"inputs of decoder.layers.1.mlp.linear_fc2.weight are not finite on the calibration"
    ):
        refitted(model, net)


def test_refitting_leaves_the_model_as_it_was(tmp_path):
    toy = Toy.of("gpt2", tmp_path)
    model = hf_toy.megatron(toy.info)
    before = hf_toy.logits(model)
    refitted(model, toy.networks()["heads"])
    assert torch.equal(hf_toy.logits(model), before)
    assert not any("observe" in vars(module) for module in model.modules())
