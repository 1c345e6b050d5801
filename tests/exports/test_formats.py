"""All formats with modulation and compensation: they are multiplied into the weights, and logits stay the checkpoint's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.exports.formats import FORMATS, Job, get_format, rounding
from flextron_mcore.settings.schema import keys
from flextron_mcore.settings.stages import STAGES
from flextron_mcore.space import ElasticSpace, SubNetwork
from tests import toy

AXES = dict(heads=[0.5, 1.0], ffn_hidden_size=[0.25, 0.5, 1.0], hidden_size=[0.5, 1.0], depth=[1, 2, 3], layer_ranking=[1, 2, 0])
SLOW = ("megatron",)  # formats that are read in a process of their own: fewer networks
CASES = [(name, kind) for name in FORMATS for kind in ("llama", "gpt2") if (name, kind) != ("gguf", "gpt2")]


def modulated(kind: str, folder: Path, compensation: bool = False) -> tuple[CheckpointInfo, torch.nn.Module]:
    """Write a model with modulation; with `compensation` it has compensated query heads, three in each of two KV groups.

    Returns:
        (info of the checkpoint, the model).
    """
    heads = dict(num_attention_heads=6, num_query_groups=2, kv_channels=8) if compensation else {}
    arch = toy.config(num_layers=3, **{"llama": toy.LLAMA, "gpt2": toy.GPT2}[kind], **heads)
    axes = {**AXES, "heads": [2, 4, 6], "attention_unit": "query_head"} if compensation else AXES
    space = ElasticSpace.build(arch, **axes, modulation=True, compensation=compensation)
    model, info = toy.model(arch, space), CheckpointInfo(arch, space)
    return replace(info, path=toy.write(model, info, folder)), model


def test_the_keys_know_every_format():
    assert keys(STAGES["export"])["format"].limits.choices == tuple(FORMATS)
    assert keys(STAGES["family"])["formats"].limits.choices == tuple(name for name in FORMATS if name != "hf_elastic")
    assert all(f"{name}: " in keys(STAGES["export"])["format"].limits.help for name in FORMATS)


def compare_logits(name: str, model: torch.nn.Module, job: Job) -> None:
    """Write an export, and compare its logits with the elastic model's, for every network that it holds."""
    written = get_format(name)
    written.write(job)
    for each in written.networks(job):
        with torch.no_grad(), use_subnetwork(model, each):
            expected = model(*toy.inputs(), None)
        tolerance = written.tolerance(job) if name == "trtllm" else 2e-5
        found = written.logits(job, each, toy.inputs()[0])
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0, msg=f"{each}")


@pytest.mark.parametrize("name, kind", CASES)
def test_modulation_is_exported(name, kind, tmp_path):
    info, model = modulated(kind, tmp_path / "run")
    small = info.space.uniform(info.model, 2, 24, 16, 2)
    nets = [small, SubNetwork.full(info.model), toy.random_network(info.model, info.space, 4)]
    for number, net in enumerate(nets[1:2] if name == "hf_elastic" else nets[2:] if name in SLOW else nets):
        (out := tmp_path / f"{number}").mkdir()
        compare_logits(name, model, Job(info, net, out))


@pytest.mark.parametrize("name", FORMATS)
def test_compensation_is_exported(name, tmp_path):
    """For every number of heads, equal in all layers or not. Exports have the same names of tensors as without compensation."""
    info, model = modulated("llama", tmp_path / "run", compensation=True)
    sizes = [(4, 24, 16, 2)] if name in ("trtllm", *SLOW) else [(2, 12), (4, 48), (4, 24, 16, 2)]
    nets = [*(info.space.uniform(info.model, *size) for size in sizes), SubNetwork.full(info.model)]
    nets = nets[:1] if name in SLOW else nets
    for number, net in enumerate([*nets, toy.random_network(info.model, info.space, 4)] if name != "hf_elastic" else nets[-1:]):
        (out := tmp_path / f"{number}").mkdir()
        compare_logits(name, model, Job(info, net, out))
        assert not [key for file in out.rglob("*.safetensors") for key in load_file(file) if "compensation" in key]


def test_modulated_bf16_weights_are_allowed_more_rounding(tmp_path):
    info, _ = modulated("llama", tmp_path / "run")
    small, full = info.space.uniform(info.model, 2, 24), SubNetwork.full(info.model)
    half = replace(info, dtype="bf16")
    plain = replace(half, space=replace(info.space, modulation=False))
    found = [rounding(Job(*given)) for given in ((half, small, tmp_path), (half, full, tmp_path), (plain, small, tmp_path))]
    assert found == [0.25, 1e-4, 1e-4]
    compensated = replace(plain, space=replace(plain.space, attention_unit="query_head", compensation=True))
    assert rounding(Job(compensated, full, tmp_path)) == 0.25
    assert rounding(Job(half, small, tmp_path, "fp32")) == rounding(Job(info, small, tmp_path)) == 1e-4
