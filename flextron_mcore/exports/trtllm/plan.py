"""The plan of a TensorRT-LLM checkpoint: its class, the sizes every layer is padded to, the layers of each rank.

Source: TensorRT-LLM's models/{gpt,llama,nemotron_nas} up to release 1.2. Its decoder layers have one size each for all layers
(GPTForCausalLM, LlamaForCausalLM), or one number of query heads for all layers (DeciLMForCausalLM).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.settings.stages import TrtllmSettings
from flextron_mcore.space import LayerChoice, SubNetwork

# Its gelu is the tanh approximation; there is no other (tensorrt_llm.functional.gelu).
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu",
    "relu": "relu",
    "squared-relu": "squared-relu",
    "swiglu": "swiglu",
    "geglu": "geglu",
}
_GATES = {"swiglu": "silu", "geglu": "gelu"}  # LLaMA's and DeciLM's MLP is always gated: they name the gate's function
APPROXIMATED = ("gelu", "geglu")
_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Plan:
    """A checkpoint to be.

    layers: those executed. numbers: what they are in the sub-network. slots: the widths that the checkpoint has room for in each.
    tp, pp: ranks that share every layer, and stages that share the layers out.
    """

    model: ModelConfig
    hidden_size: int
    layers: tuple[LayerChoice, ...]
    numbers: tuple[int, ...]
    slots: tuple[LayerChoice, ...]
    style: str
    tp: int
    pp: int

    @property
    def architecture(self) -> str:
        """The class of TensorRT-LLM."""
        if self.style == "deci":
            return "DeciLMForCausalLM"
        return "LlamaForCausalLM" if _is_llama(self.model) else "GPTForCausalLM"

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer: what TensorRT-LLM makes of the vocabulary so that `tp` divides it."""
        return -(-self.model.vocab_size // self.tp) * self.tp

    def stage(self, number: int) -> range:
        """The layers of a pipeline stage; the first stages have one more where they cannot all have the same number."""
        least, more = divmod(len(self.layers), self.pp)
        first = number * least + min(number, more)
        return range(first, first + least + (number < more))


def make_plan(model: ModelConfig, net: SubNetwork, settings: TrtllmSettings) -> Plan:
    """The plan for `net`. Raises FlextronError for what no class can hold."""
    style, tp, pp = settings.style, settings.tensor_parallel_size, settings.pipeline_parallel_size
    if misfit := _misfit(model, style):
        raise FlextronError(f"format=trtllm: {misfit}")
    kept = [i for i, layer in enumerate(net.layers) if layer.executed]
    layers = tuple(net.layers[i] for i in kept)
    if pp > len(layers):
        raise FlextronError(f"trtllm.pipeline_parallel_size={pp} is more than the {len(layers)} layers of the sub-network")
    slots = _deci_slots(layers) if style == "deci" else _padded_slots(layers)
    plan = Plan(model, net.hidden_size, layers, tuple(kept), tuple(slots), style, tp, pp)
    _check_division(plan)
    return plan


def config(plan: Plan, dtype: str) -> dict[str, Any]:
    """config.json, the arguments of TensorRT-LLM's PretrainedConfig."""
    model, widest = plan.model, plan.slots[0]
    llama = _is_llama(model)
    rope = model.position_embedding_type == "rope"
    scaling = dict(model.rope_scaling) | {"rope_type": model.rope_scaling["type"]} if model.rope_scaling else None
    values = {
        "architecture": plan.architecture,
        "dtype": _TYPES[dtype],
        "logits_dtype": "float32",
        "vocab_size": model.vocab_size,
        "hidden_size": plan.hidden_size,
        "num_hidden_layers": len(plan.layers),
        "num_attention_heads": widest.num_attention_heads,
        "num_key_value_heads": max(slot.kv_groups for slot in plan.slots),
        "head_size": model.kv_channels,
        "intermediate_size": max(slot.ffn_hidden_size for slot in plan.slots),
        "hidden_act": (_GATES if llama else _ACTIVATIONS)[model.activation],
        "norm_epsilon": model.layernorm_epsilon,
        "position_embedding_type": "rope_gpt_neox" if rope else "learned_absolute",
        "max_position_embeddings": model.max_position_embeddings,
        "rotary_base": model.rotary_base,
        "rotary_scaling": scaling,
        "qk_layernorm": False,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "mapping": {"world_size": plan.tp * plan.pp, "tp_size": plan.tp, "pp_size": plan.pp},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }
    if plan.style == "deci":
        layer = lambda slot: {  # noqa: E731
            "attention": {"impl": "attention", "num_key_value_heads": slot.kv_groups},
            "ffn": {"impl": "mlp", "intermediate_size": slot.ffn_hidden_size},
        }
        return values | {"layer_configs": [layer(slot) for slot in plan.slots]}
    if llama:
        return values | {"attn_bias": model.bias, "mlp_bias": model.bias}
    return values | {"bias": model.bias, "q_scaling": 1.0, "apply_query_key_layer_scaling": False, "rotary_pct": 1.0}


def _is_llama(model: ModelConfig) -> bool:
    return model.normalization == "rmsnorm"


def _misfit(model: ModelConfig, style: str) -> str | None:
    """Why no class of TensorRT-LLM computes `model`; None if one does."""
    if _is_llama(model):
        if not model.gated:
            return (
                f"LlamaForCausalLM has a gated MLP (swiglu or geglu); this model has rmsnorm with activation={model.activation}"
            )
        if model.position_embedding_type != "rope":
            return "LlamaForCausalLM has rotary positions; this model has rmsnorm with learned ones"
        if style == "deci" and model.bias:
            return "DeciLMForCausalLM has no biases and this model has: use trtllm.style=padded"
    elif style == "deci":
        return f"DeciLMForCausalLM needs rmsnorm and this model has {model.normalization}: use trtllm.style=padded"
    return None


def _padded_slots(layers: tuple[LayerChoice, ...]) -> list[LayerChoice]:
    widest = LayerChoice(
        True,
        max(layer.kv_groups for layer in layers),
        max(layer.query_heads_per_group for layer in layers),
        max(layer.ffn_hidden_size for layer in layers),
    )
    return [widest] * len(layers)


def _deci_slots(layers: tuple[LayerChoice, ...]) -> list[LayerChoice]:
    """All with the query heads of the widest layer; KV heads as many as the layer has, or the next number that divides those.

    These always leave room for the layer's own: a space varies the groups or the queries of a group, not both.
    """
    heads = max(layer.num_attention_heads for layer in layers)
    chosen = [next(n for n in range(layer.kv_groups, heads + 1) if heads % n == 0) for layer in layers]
    return [LayerChoice(True, n, heads // n, layer.ffn_hidden_size) for n, layer in zip(chosen, layers, strict=True)]


def _check_division(plan: Plan) -> None:
    """Every rank has as many heads and neurons as every other; KV heads may instead be copied to several ranks."""
    tp = plan.tp
    complaints = []
    for number, layer, slot in zip(plan.numbers, plan.layers, plan.slots, strict=True):
        for what, own, size in (
            ("query heads", layer.num_attention_heads, slot.num_attention_heads),
            ("KV heads", layer.kv_groups, slot.kv_groups),
            ("neurons", layer.ffn_hidden_size, slot.ffn_hidden_size),
        ):
            if size % tp and not (what == "KV heads" and tp % size == 0):
                complaints.append((own != size, f"layers[{number}] has {size} {what}{'' if own == size else ' after padding'}"))
    if complaints:
        _, first = min(complaints, key=lambda complaint: complaint[0])  # a layer that has them of itself, rather
        raise FlextronError(
            f"trtllm.tensor_parallel_size={tp}: {first}, which it does not divide: use a smaller one, or another sub-network"
        )
