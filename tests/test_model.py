"""Building a Megatron-Core model from its configuration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megatron.core.tensor_parallel.random import HAVE_TE

from flextron_mcore.choosing import set_subnetwork, use_subnetwork
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.layers.attention import HeadLayout
from flextron_mcore.layers.gpt import mask_padding
from flextron_mcore.layers.state import FULL
from flextron_mcore.model import build_model, check_layout, transformer_config
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.space import ElasticSpace, SubNetwork
from flextron_mcore.specs import elastic_gpt_layer_spec
from tests import toy


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(hidden_size=30), "model.hidden_size=30 is not divisible by model.num_attention_heads=4: set the size of one head"),
        (dict(num_query_groups=3), "model.num_attention_heads=4 is not divisible by model.num_query_groups=3"),
        (dict(rotary_percent=0.0), "model.rotary_percent=0.0 must be above 0 and at most 1"),
        (
            dict(kv_channels=6, rotary_percent=0.5),
            "model.kv_channels=6 x model.rotary_percent=0.5 is odd: rotary embeddings need",
        ),
        (dict(sliding_window=0), "model.sliding_window must be a whole number of at least 1, not 0"),
        (dict(no_rope_freq=[1]), "model.no_rope_freq=[1] must be one number, 0 or 1, for each of the 2 layers"),
        (
            dict(qk_layernorm=True, normalization="layernorm"),
            "model.qk_layernorm=true needs model.normalization=rmsnorm (it is layernorm)",
        ),
        (
            dict(sliding_window=4, window_attn_skip_freq=[1, 2]),
            "model.window_attn_skip_freq=[1, 2] must be one number, 0 or 1, for each of the 2 layers: 1 where a query",
        ),
        (dict(window_attn_skip_freq=[0, 1]), "model.window_attn_skip_freq needs a window: set model.sliding_window"),
        (dict(num_layers=0), "model.num_layers must be a whole number of at least 1, not 0"),
        (dict(kv_channels=7), "model.kv_channels=7 is odd: rotary embeddings need an even number of channels"),
        (dict(activation="swish"), "model.activation='swish' is not known: use one of gelu"),
        (dict(normalization="batchnorm"), "model.normalization='batchnorm' is not known"),
        (dict(rope_scaling={"type": "yarn"}), "model.rope_scaling of type yarn lacks factor, original_max_position_embeddings"),
        (dict(rope_scaling={"type": "linear"}), "model.rope_scaling of type linear lacks factor"),
    ],
)
def test_architectures_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(FlextronError) as error:
        toy.config(**changes)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_configuration_round_trip():
    arch = toy.config(rope_scaling={"type": "linear", "factor": 2.0}, num_query_groups=2)
    assert ModelConfig.from_dict(arch.to_dict()) == arch


def test_weights_have_the_asked_precision():
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
    with pytest.raises(FlextronError, match="backend='apex' is not known: use one of local, te"):
        elastic_gpt_layer_spec(ElasticSpace.build(toy.config()), backend="apex")
    with pytest.raises(FlextronError, match="model.transformer_impl=apex: use one of local, transformer_engine"):
        transformer_config(toy.config(), LayoutSettings(transformer_impl="apex"))


@pytest.mark.skipif(HAVE_TE, reason="Transformer Engine is installed: tests/gpu/test_te.py")
def test_transformer_engine_is_asked_for_where_it_is_not():
    space = ElasticSpace.build(toy.config())
    with pytest.raises(FlextronError, match="backend='te' needs Transformer Engine, which cannot be imported here: use 'local'"):
        elastic_gpt_layer_spec(space, backend="te")
    with pytest.raises(FlextronError, match="model.transformer_impl=transformer_engine: it cannot be imported here"):
        check_layout(toy.config(), space, LayoutSettings(transformer_impl="transformer_engine"))


def test_what_the_elastic_layers_lack_is_refused():
    arch = toy.config()
    space, full = ElasticSpace.build(arch), SubNetwork.full(arch)
    with pytest.raises(FlextronError, match="model.context_parallel_size > 1 is not supported by the elastic attention: use 1"):
        build_model(arch, space, LayoutSettings(context_parallel_size=2))
    with pytest.raises(FlextronError, match=r"tensor_model_parallel_size=3 does not divide model.num_query_groups=4: choose one"):
        HeadLayout.of(transformer_config(arch), 3)
    model = build_model(arch, space)
    for net, message in (
        (replace(full, layers=full.layers[:1]), "sub-network has 1 layers, the model has 2: choose one of its own"),
        (replace(full, hidden_size=64), "sub-network has hidden_size 64, the model has 32: choose one of its own"),
    ):
        with pytest.raises(FlextronError, match=message):
            set_subnetwork(model, net)
    attention = model.decoder.layers[0].self_attention
    with pytest.raises(FlextronError, match="attention_output_gate and fused_single_qkv_rope are not supported"):
        attention.get_query_key_value_tensors(torch.zeros(2, 1, 32), output_gate=True)


RECOMPUTATIONS = {
    "full, uniform": dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=2),
    "full, block": dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=1),
    "selective": dict(recompute_granularity="selective", recompute_modules=["core_attn", "mlp"]),
}


@pytest.mark.parametrize("family", [toy.LLAMA, toy.GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("recompute", RECOMPUTATIONS.values(), ids=RECOMPUTATIONS)
def test_recomputation_uses_the_choice_of_its_forward_pass(recompute, family):
    """Two networks in flight, as in a pipeline: both forward passes come before both backward passes."""
    arch = toy.config(num_layers=4, **family)
    space = ElasticSpace.build(arch, hidden_size=[0.5, 1.0], depth=[2, 4], layer_ranking=[3, 0, 1, 2])
    networks = [toy.random_network(arch, space, seed) for seed in (1, 2)]
    assert {(net.hidden_size, sum(layer.executed for layer in net.layers)) for net in networks} == {(16, 4), (32, 2)}
    gradients = []
    for options in ({}, recompute):
        torch.manual_seed(0)
        model = build_model(arch, space, LayoutSettings(**options)).train()
        losses = []
        for i, net in enumerate(networks):
            tokens, positions = toy.inputs(seed=i)
            with use_subnetwork(model, net):
                losses.append(model(tokens, positions, None, labels=tokens).sum())
        set_subnetwork(model, None)
        for loss in losses:
            loss.backward()
        assert all(layer.state is FULL for layer in model.decoder.layers)  # the full model again
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(tensor_model_parallel_size=4), "model.tensor_model_parallel_size=4 does not divide space.granularity=2"),
        (dict(pipeline_model_parallel_size=4), "model.pipeline_model_parallel_size=4: does not divide the model's 6 layers"),
        (
            dict(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=7),
            "model.pipeline_model_parallel_size=2: does not divide the model's 6 layers less the 7 of the first and last stage",
        ),
        (
            dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
            "model.virtual_pipeline_model_parallel_size=2: does not divide the 3 layers of a stage",
        ),
        (dict(sequence_parallel=True), "model: "),
        (dict(recompute_granularity="full"), "model.recompute_granularity=full: needs model.recompute_method="),
        (
            dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=4),
            "model.recompute_num_layers=4: does not divide the 6 layers of a stage",
        ),
        (
            dict(recompute_granularity="selective", recompute_modules=["layernorm"]),
            "model.recompute_modules: layernorm needs Transformer Engine",
        ),
        (dict(recompute_granularity="selective", recompute_modules=["everything"]), "model: "),
    ],
)
def test_layouts_that_do_not_fit_are_refused(options, message):
    arch = toy.config(num_layers=6)
    space = ElasticSpace.build(arch, granularity=2, heads=[0.5, 1.0])
    with pytest.raises(FlextronError) as error:
        check_layout(arch, space, LayoutSettings(**options))
    assert str(error.value).startswith(message)


def test_the_padding_of_the_vocabulary_has_no_probability():
    logits = torch.randn(2, 3, toy.VOCAB + 5, requires_grad=True)
    masked = mask_padding(logits, toy.VOCAB)
    torch.testing.assert_close(masked.softmax(-1)[..., : toy.VOCAB], logits[..., : toy.VOCAB].softmax(-1))
    assert (masked.softmax(-1)[..., toy.VOCAB :] == 0).all()
    assert mask_padding(logits, toy.VOCAB + 5) is logits
