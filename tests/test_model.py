"""Building a model from its configuration."""

from __future__ import annotations

import pytest
import torch

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.model import build_model, transformer_config, unwrap
from flextron_mcore.space import ElasticSpace
from flextron_mcore.specs import elastic_gpt_layer_spec
from tests import toy


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hidden_size=30), "model.hidden_size=30 is not divisible by model.num_attention_heads=4: set model.kv_channels"),
        (dict(num_query_groups=3), "model.num_attention_heads=4 is not divisible by model.num_query_groups=3"),
        (dict(num_layers=0), "model.num_layers must be a whole number of at least 1, not 0"),
        (dict(kv_channels=7), "model.kv_channels=7 is odd: rotary embeddings need an even head size"),
        (dict(activation="swish"), "model.activation='swish' is not known: use one of gelu"),
        (dict(normalization="batchnorm"), "model.normalization='batchnorm' is not known"),
        (dict(rope_scaling={"type": "yarn"}), "model.rope_scaling.type='yarn' is not known: use one of linear, llama3"),
        (dict(rope_scaling={"type": "linear"}), "model.rope_scaling of type linear lacks factor"),
    ],
)
def test_architectures_that_do_not_fit(changes, message):
    with pytest.raises(FlextronError) as error:
        toy.config(**changes)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_configuration_round_trip():
    arch = toy.config(rope_scaling={"type": "linear", "factor": 2.0}, num_query_groups=2)
    assert ModelConfig.from_dict(arch.to_dict()) == arch


def test_precisions():
    arch = toy.config()
    model = build_model(arch, ElasticSpace.build(arch), precision="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(FlextronError, match="precision 'int8' is not known: use one of fp32, bf16"):
        transformer_config(arch, precision="int8")


def test_unwrap_finds_the_model():
    arch = toy.config()
    model = build_model(arch, ElasticSpace.build(arch))
    outer = torch.nn.Module()
    outer.module = model
    assert unwrap(outer) is model is unwrap(model)


def test_the_spec_says_which_backends_there_are():
    with pytest.raises(FlextronError, match="backend='te' is not available: use 'local'"):
        elastic_gpt_layer_spec(ElasticSpace.build(toy.config()), backend="te")
