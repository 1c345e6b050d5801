"""Every family in every format: random models and sub-networks compute what transformers computes with zeros in unused places.

CI draws two models of each family, and two networks of each. FLEXTRON_FAMILIES="10 5" draws ten and five, whose figures are in
docs/results/families.md; with `-s` the largest differences are printed.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from pathlib import Path

import pytest
import torch

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.exports.formats import FORMATS, Job, get_format
from flextron_mcore.families.family import FEATURES
from flextron_mcore.space import SubNetwork, count_parameters
from tests import hf_toy
from tests.families import random_cases

EXACT = 1e-12  # largest difference of logits in fp64
# gguf is left out without llama.cpp, unless FLEXTRON_REQUIRE_LLAMA_CPP demands it.
LLAMA_CPP = importlib.util.find_spec("llama_cpp") or os.environ.get("FLEXTRON_REQUIRE_LLAMA_CPP") == "1"
MODELS, NETWORKS = map(int, os.environ.get("FLEXTRON_FAMILIES", "2 2").split())


def expected_refusal(info: CheckpointInfo, net: SubNetwork, name: str) -> str | None:
    """Word of the message with which a format refuses a network, None where it must hold it."""
    model, scaling = info.model, (info.model.rope_scaling or {}).get("type")
    partial, windowed = model.rotary_percent < 1 and model.normalization == "rmsnorm", model.sliding_window is not None
    if name == "gguf":
        if model.normalization == "layernorm":  # GPT-2
            return "needs normalization=rmsnorm"
        if model.qk_layernorm or model.normalization == "layernorm1p":
            if not net.is_uniform:
                return "different widths"
            heads = net.executed_layers[0].num_attention_heads * model.kv_channels
            if heads != net.hidden_size and not model.qk_layernorm:
                return "heads that do not fill"
            if model.share_embeddings_and_output_weights and not model.qk_layernorm:
                return "tied embeddings"
            if scaling in ("llama3", "longrope"):
                return "Llama 3" if scaling == "llama3" else scaling
        for field in ("sliding_window", "no_rope_freq", "rotary_percent"):
            if model.normalization == "rmsnorm" and getattr(model, field) != FEATURES[field]:
                return field
    if name == "trtllm":
        faults = {
            "normalise queries and keys": model.qk_layernorm,
            "rotate the heads of all layers": model.no_rope_freq,
            "sliding window": windowed,
            "no yarn": scaling == "yarn",
            "no longrope": scaling == "longrope",
            "rotates whole heads": partial,
        }
        return next((word for word, found in faults.items() if found), None)
    return None


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of logits, relative to their standard deviation where that is above 1."""
    return (found - expected).abs().max().item() / max(1.0, expected.std().item())


def compare(found: torch.Tensor, expected: torch.Tensor, what: str, most: float) -> float:
    """Difference of logits, which is at most `most`."""
    off = difference(found, expected)
    assert off <= most, f"{what}: {off}, more than {most}"
    return off


@pytest.mark.parametrize("number", range(MODELS))
@pytest.mark.parametrize("family", random_cases.FAMILIES)
def test_every_format_computes_the_sub_network(family, number, tmp_path, request):
    theirs = random_cases.random_model(family, number)
    source = hf_toy.save(theirs, tmp_path / "hf")
    info = hf_toy.checkpoint(source, tmp_path / "run", random_cases.random_space(theirs, number))
    ours, whole, exact = hf_toy.megatron(info).double(), SubNetwork.full(info.model), copy.deepcopy(theirs).double()
    elastic = tmp_path / "hf_elastic"
    elastic.mkdir()
    get_format("hf_elastic").write(Job(info, whole, elastic))
    loaded = hf_toy.double(hf_toy.load(elastic))
    seen: dict[str, float] = {}
    for i, net in enumerate([*random_cases.random_networks(info, NETWORKS, number), whole]):
        expected = hf_toy.logits(hf_toy.double(hf_toy.masked(exact, info.model, net)))
        assert expected.std() > 0.05
        loaded.set_subnetwork(net.to_dict())
        found = {"sliced": hf_toy.logits(ours, net), "hf_elastic": hf_toy.logits(loaded)}
        assert loaded.costs()["parameters"] == count_parameters(info.model, net)
        for name in FORMATS.keys() - {"hf_elastic"}:
            found |= exported(info, net, name, tmp_path / f"{name}_{i}", request)
        # Engines of the other formats compute in fp32: four times the rounding of transformers in fp32 is allowed.
        single = {name for name, logits in found.items() if logits.dtype == torch.float32}
        rounding = difference(hf_toy.logits(hf_toy.masked(theirs, info.model, net)), expected) if single else 0.0
        for name, logits in found.items():
            most = max(hf_toy.ATOL, 4 * rounding) if name in single else EXACT
            seen[name] = max(seen.get(name, 0.0), compare(logits, expected, f"{name}, network {i}: {net}", most))
    print(f"{family} {number}: " + ", ".join(f"{name} {value:.1e}" for name, value in seen.items()))


def exported(
    info: CheckpointInfo, net: SubNetwork, name: str, out: Path, request: pytest.FixtureRequest
) -> dict[str, torch.Tensor]:
    """{reader of the format: logits}; empty for a network that the format refuses with the expected words."""
    out.mkdir()
    job, form = Job(info, net, out), get_format(name)
    if word := expected_refusal(info, net, name):
        with pytest.raises(FlextronError, match=f"format={name}: .*{word}"):
            form.write(job)
        assert not list(out.iterdir())
        return {}
    figures = form.write(job)
    assert figures["parameters"] == count_parameters(info.model, net)
    if name == "hf":
        return {name: hf_toy.logits(hf_toy.double(hf_toy.load(out)))}
    if name == "megatron":  # loaded here, because a process of its own takes seconds to start
        from tests.exports.test_megatron import code, loaded

        with torch.no_grad():
            return {name: code(out).logits(loaded(out).double().eval(), hf_toy.tokens())}
    found = {name: form.logits(job, net, hf_toy.tokens())}
    short = info.model.short_context  # llama.cpp takes the long factors where its context, 256 tokens, is longer
    if name == "gguf" and LLAMA_CPP and not (short and short >= hf_toy.LENGTH):
        found["llama.cpp"] = request.getfixturevalue("engine")(out / "model.gguf").logits(hf_toy.tokens())
    return found
