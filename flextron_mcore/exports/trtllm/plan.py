"""Plan of a TensorRT-LLM checkpoint: its class, the widths that layers are padded to, the layers of each rank.

In GPTForCausalLM, LlamaForCausalLM and Qwen2ForCausalLM all layers have the same widths, in DeciLMForCausalLM the same number
of query heads.
Source: TensorRT-LLM's models/{gpt,llama,qwen,nemotron_nas}, up to release 1.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.exports.padding import deci_slots, widest_slots
from flextron_mcore.settings.formats import TrtllmSettings
from flextron_mcore.space import LayerChoice, SubNetwork

# {our activation: TensorRT-LLM's}; its gelu is always the tanh approximation (tensorrt_llm.functional.gelu).
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu",
    "relu": "relu",
    "squared-relu": "squared-relu",
    "swiglu": "swiglu",
    "geglu": "geglu",
}
_GATES = {"swiglu": "silu", "geglu": "gelu"}  # the always gated MLPs of LLaMA and DeciLM name the function of the gate
APPROXIMATED = ("gelu", "geglu")
_TYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Plan:
    """Layout of a checkpoint for TensorRT-LLM.

    Attributes:
        model: architecture of the full model.
        hidden_size: hidden size of the sub-network.
        layers: sizes of the executed layers.
        numbers: indices of these layers in the sub-network.
        slots: widths that each of these layers is padded to with zeros.
        style: `padded` (same widths in all layers) or `deci` (DeciLMForCausalLM), of TrtllmSettings.
        tp: number of tensor-parallel ranks.
        pp: number of pipeline stages.
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
        """Name of TensorRT-LLM's class."""
        if self.style == "deci":
            return "DeciLMForCausalLM"
        if self.model.add_qkv_bias:
            return "Qwen2ForCausalLM"
        return "LlamaForCausalLM" if _is_llama(self.model) else "GPTForCausalLM"

    @property
    def vocabulary(self) -> int:
        """Rows of the output layer: the vocabulary, padded to a multiple of `tp` as TensorRT-LLM does."""
        return -(-self.model.vocab_size // self.tp) * self.tp

    def stage(self, number: int) -> range:
        """Indices into `layers` of the layers of pipeline stage `number`, from 0.

        If the stages do not divide the layers, the first stages get one more.
        """
        least, more = divmod(len(self.layers), self.pp)
        first = number * least + min(number, more)
        return range(first, first + least + (number < more))


def make_plan(model: ModelConfig, net: SubNetwork, settings: TrtllmSettings) -> Plan:
    """Plan the TensorRT-LLM checkpoint of a sub-network.

    Args:
        model: architecture of the full model.
        net: sub-network.
        settings: style and parallel sizes.

    Raises:
        FlextronError: no class of TensorRT-LLM can hold the model, the tensor-parallel size does not divide the heads and neurons
            of a layer, or there are more pipeline stages than layers.
    """
    style, tp, pp = settings.style, settings.tensor_parallel_size, settings.pipeline_parallel_size
    if misfit := _misfit(model, style):
        raise FlextronError(f"format=trtllm: {misfit}")
    kept = [i for i, layer in enumerate(net.layers) if layer.executed]
    layers = tuple(net.layers[i] for i in kept)
    if pp > len(layers):
        raise FlextronError(
            f"trtllm.pipeline_parallel_size={pp} is more than the {len(layers)} layers of the sub-network: lower it"
        )
    slots = deci_slots(layers) if style == "deci" else widest_slots(layers)
    plan = Plan(model, net.hidden_size, layers, tuple(kept), tuple(slots), style, tp, pp)
    _check_division(plan)
    return plan


def config(plan: Plan, dtype: str) -> dict[str, Any]:
    """Content of config.json: arguments of TensorRT-LLM's PretrainedConfig. dtype: fp32, bf16 or fp16."""
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
    if model.add_qkv_bias:
        return values | {"qwen_type": "qwen2", "attn_bias": True, "mlp_bias": model.bias}
    if llama:
        return values | {"attn_bias": model.bias, "mlp_bias": model.bias}
    return values | {
        "bias": model.bias,
        "q_scaling": 1.0,
        "apply_query_key_layer_scaling": False,
        "rotary_pct": model.rotary_percent,
    }


def _is_llama(model: ModelConfig) -> bool:
    """True for a model of a class like LlamaForCausalLM (RMSNorm), False for GPTForCausalLM (LayerNorm)."""
    return model.normalization == "rmsnorm"


def _misfit(model: ModelConfig, style: str) -> str | None:
    """Reason why none of the classes of TensorRT-LLM that a Plan can have computes the model; None if one does."""
    if model.qk_layernorm:
        return "the exported classes do not normalise queries and keys, as this model does: use format=hf"
    if model.no_rope_freq is not None:
        return "the exported classes rotate the heads of all layers, this model leaves some out: use format=hf"
    if model.sliding_window is not None and model.sliding_window < model.max_position_embeddings:
        return f"the exported classes have no sliding window, this model has one of {model.sliding_window} tokens: use format=hf"
    if (kind := (model.rope_scaling or {}).get("type")) in ("yarn", "longrope"):
        return f"the exported classes have no {kind} for layers like this model's: use format=hf"
    if _is_llama(model):
        if model.rotary_percent != 1:
            return (
                f"LlamaForCausalLM rotates whole heads, this model a share of {model.rotary_percent:g} of each: "
                "use format=megatron"
            )
        if not model.gated:
            return (
                f"LlamaForCausalLM has a gated MLP (swiglu or geglu), this model has rmsnorm with activation={model.activation}: "
                "use format=megatron"
            )
        if model.position_embedding_type != "rope":
            return "LlamaForCausalLM has rotary positions, this model has rmsnorm with learned ones: use format=megatron"
        if model.add_qkv_bias and model.bias:
            return "Qwen2ForCausalLM has no bias in its output projection, this model has one: use format=megatron"
        if style == "deci" and model.qkv_bias:
            return "DeciLMForCausalLM has no biases, this model has some: use trtllm.style=padded"
    elif style == "deci":
        return f"DeciLMForCausalLM needs rmsnorm, this model has {model.normalization}: use trtllm.style=padded"
    return None


def _check_division(plan: Plan) -> None:
    """Raise FlextronError unless `tp` divides the heads and neurons of every layer, padding included.

    A number of KV heads that divides `tp` is allowed too: the heads are copied to several ranks.
    """
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
        _, first = min(complaints, key=lambda complaint: complaint[0])  # prefer a layer without padding
        raise FlextronError(
            f"trtllm.tensor_parallel_size={tp}: {first}, which it does not divide: use a smaller size, or another sub-network"
        )
