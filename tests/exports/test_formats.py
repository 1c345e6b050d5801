"""All formats with modulation: gains are multiplied into the weights, and logits stay those of the checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choosing import use_subnetwork
from flextron_mcore.exports.formats import FORMATS, Job, get_format, rounding
from flextron_mcore.settings.schema import keys
from flextron_mcore.settings.stages import STAGES
from flextron_mcore.space import ElasticSpace, SubNetwork
from tests import toy

AXES = dict(heads=[0.5, 1.0], ffn_hidden_size=[0.25, 0.5, 1.0], hidden_size=[0.5, 1.0], depth=[1, 2, 3], layer_ranking=[1, 2, 0])
CASES = [(name, kind) for name in FORMATS for kind in ("llama", "gpt2") if (name, kind) != ("gguf", "gpt2")]


def modulated(kind: str, folder: Path) -> tuple[CheckpointInfo, torch.nn.Module]:
    arch = toy.config(num_layers=3, **{"llama": toy.LLAMA, "gpt2": toy.GPT2}[kind])
    space = ElasticSpace.build(arch, **AXES, modulation=True)
    model, info = toy.model(arch, space), CheckpointInfo(arch, space)
    return replace(info, path=toy.write(model, info, folder)), model


def test_the_keys_know_every_format():
    assert keys(STAGES["export"])["format"].limits.choices == tuple(FORMATS)
    assert keys(STAGES["family"])["formats"].limits.choices == tuple(name for name in FORMATS if name != "hf_elastic")
    assert all(f"{name}: " in keys(STAGES["export"])["format"].limits.help for name in FORMATS)


@pytest.mark.parametrize("name, kind", CASES)
def test_modulation_is_exported(name, kind, tmp_path):
    info, model = modulated(kind, tmp_path / "run")
    small = info.space.uniform(info.model, 2, 24, 16, 2)
    nets = [small, SubNetwork.full(info.model), toy.random_network(info.model, info.space, 4)]
    written, tokens = get_format(name), toy.inputs()[0]
    for number, net in enumerate(nets if name != "hf_elastic" else nets[1:2]):
        (out := tmp_path / f"{number}").mkdir()
        job = Job(info, net, out)
        written.write(job)
        for each in written.networks(job):
            with torch.no_grad(), use_subnetwork(model, each):
                expected = model(*toy.inputs(), None)
            tolerance = written.tolerance(job) if name == "trtllm" else 2e-5
            torch.testing.assert_close(written.logits(job, each, tokens), expected, atol=tolerance, rtol=0, msg=f"{each}")


def test_modulated_bf16_weights_are_allowed_more_rounding(tmp_path):
    info, _ = modulated("llama", tmp_path / "run")
    small, full = info.space.uniform(info.model, 2, 24), SubNetwork.full(info.model)
    half = replace(info, dtype="bf16")
    plain = replace(half, space=replace(info.space, modulation=False))
    found = [rounding(Job(*given)) for given in ((half, small, tmp_path), (half, full, tmp_path), (plain, small, tmp_path))]
    assert found == [0.25, 1e-4, 1e-4]
    assert rounding(Job(half, small, tmp_path, "fp32")) == rounding(Job(info, small, tmp_path)) == 1e-4
