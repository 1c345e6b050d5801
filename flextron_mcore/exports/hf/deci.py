"""Export as DeciLMForCausalLM (Nemotron-NAS), which vLLM, llama.cpp and TensorRT-LLM compute with code of their own.

SGLang computes it, too, if all layers have the same number of key-value heads. DeciLM is a Llama without biases. All layers have
the same number of query heads. Each layer has its own number of key-value heads, which must divide the number of query heads, and
its own number of neurons, a multiple of 256. Source: vLLM's model_executor/models/nemotron_nas.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families.family import Family
from flextron_mcore.families.llama import FAMILY
from flextron_mcore.space import LayerChoice

ARCHITECTURE = "DeciLMForCausalLM"
FFN_MULTIPLE = 256
_CONFIGURATION, _MODELING = "configuration_decilm", "modeling_decilm"
# Keys of an entry of block_configs that engines read; these values leave all that they control switched off.
_ATTENTION = {
    "no_op": False,
    "num_sink_tokens": None,
    "replace_with_linear": False,
    "sparsify": None,
    "unshifted_sink": False,
    "use_prefill_window_in_sink_attention": False,
    "window_length": None,
}
_FFN = {"no_op": False, "replace_with_linear": False, "sparsify": None}


def deci_family(model: ModelConfig) -> Family:
    """Llama's declaration under DeciLM's names. Raises FlextronError for a model that DeciLM cannot represent."""
    misfits = [*FAMILY.misfits(model), *([f"bias=False (it is {model.bias})"] if model.bias else [])]
    if misfits:
        raise FlextronError(f"hf.style=nemotron_nas: {ARCHITECTURE} needs {misfits[0]}: use hf.style=auto")
    return replace(FAMILY, name="DeciLM", architecture=ARCHITECTURE, model_type="nemotron-nas")


def deci_config(layers: Sequence[LayerChoice], hidden_size: int) -> dict[str, Any]:
    """Keys of config.json that a Llama does not have. num_key_value_heads is null: each layer has its own number.

    Args:
        layers: widths of the layers, padding included; neurons are multiples of FFN_MULTIPLE.
        hidden_size: channels of the network.
    """
    return {
        "auto_map": {
            "AutoConfig": f"{_CONFIGURATION}.DeciLMConfig",
            "AutoModel": f"{_MODELING}.DeciLMModel",
            "AutoModelForCausalLM": f"{_MODELING}.{ARCHITECTURE}",
        },
        "num_key_value_heads": None,
        "block_configs": [
            {
                "attention": {"n_heads_in_group": layer.query_heads_per_group, **_ATTENTION},
                "ffn": {"ffn_mult": 1.5 * layer.ffn_hidden_size / hidden_size, **_FFN},
            }
            for layer in layers
        ],
    }


def write_deci_code(out: Path, source: Path) -> None:
    """Write the Python files of the directory `out`. source: directory of the format's code.

    The model is the one for Llamas with different widths in each layer, under DeciLM's names.
    """
    configuration = (source / f"{_CONFIGURATION}.py").read_text(encoding="utf-8")
    modeling = (source / "modeling_flextron_llama.py").read_text(encoding="utf-8")
    modeling = modeling.replace("configuration_flextron_llama", _CONFIGURATION).replace("FlextronLlama", "DeciLM")
    for name, text in ((_CONFIGURATION, configuration), (_MODELING, modeling)):
        (out / f"{name}.py").write_text(text, encoding="utf-8")
