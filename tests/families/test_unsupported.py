"""Models of other architectures are refused by name, with the feature that is not supported."""

from __future__ import annotations

import pytest

from flextron_mcore.config import FlextronError
from flextron_mcore.families import FAMILIES, family_of_config, family_of_model
from tests import toy


@pytest.mark.parametrize(
    "architecture, words",
    [
        ("MixtralForCausalLM", "it has experts"),
        ("Qwen3MoeForCausalLM", "it has experts"),
        ("DeepseekForCausalLM", "it has experts"),
        ("Gemma2ForCausalLM", "it has norms after its blocks, or soft caps"),
        ("Gemma3ForConditionalGeneration", "it has norms after its blocks"),
        ("Olmo2ForCausalLM", "it has norms after its blocks"),
        ("GemmaForCausalLM", "it has factors on embeddings"),
        ("GraniteForCausalLM", "it has factors"),
        ("PhiForCausalLM", "it has attention and MLP side by side"),
        ("NemotronHForCausalLM", "it has layers that are not attention"),
        ("NeverHeardOfForCausalLM", "is not supported: only Llama"),
    ],
)
def test_architectures_are_refused_by_name(architecture, words):
    with pytest.raises(FlextronError, match=f"architecture {architecture} is not supported") as caught:
        family_of_config({"architectures": [architecture]})
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert all(family.architecture in str(caught.value) for family in FAMILIES)


def test_a_quantized_model_of_no_family_is_refused_for_what_it_is():
    """A quantized model whose original is not supported either is refused for its architecture."""
    config = {"architectures": ["GptOssForCausalLM"], "quantization_config": {"quant_method": "mxfp4"}}
    with pytest.raises(FlextronError, match="architecture GptOssForCausalLM is not supported: it has experts"):
        family_of_config(config)


def test_images_are_seen_in_the_keys():
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": {}, "vision_config": {}}
    with pytest.raises(FlextronError, match="Mistral3ForConditionalGeneration is not supported: it has inputs other than text"):
        family_of_config(config)


def test_experts_are_seen_in_the_keys():
    with pytest.raises(FlextronError, match='model_type "new" is not supported: it has experts'):
        family_of_config({"model_type": "new", "num_local_experts": 8})


def test_a_model_of_no_family_is_for_another_format():
    words = r"format=hf: no supported family can represent this model: .* needs .*: use format=megatron"
    with pytest.raises(FlextronError, match=words):
        family_of_model(toy.config(activation="relu", normalization="rmsnorm"), None)
