"""Arguments of Megatron-LM's `pretrain_gpt.py` for a dense model."""

from __future__ import annotations

from flextron_mcore.config import ModelConfig
from flextron_mcore.space import SubNetwork

# Megatron-Core's defaults for the Llama 3 scaling of RoPE.
LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def not_on_the_command_line(model: ModelConfig, net: SubNetwork) -> str | None:
    """Reason why Megatron-LM's arguments cannot describe `model`, a sub-network as a dense model; None if they can."""
    if not net.is_uniform:
        return "the layers have different widths, and its --heterogeneous-layers-config-path takes Nemotron's configurations only"
    if model.activation in ("relu", "geglu") or (model.activation == "gelu_tanh" and not model.bias):
        return f"it has no argument for the activation {model.activation}" + (
            " without biases" if model.activation == "gelu_tanh" else ""
        )
    if model.position_embedding_type == "rope" and model.rotary_base != int(model.rotary_base):
        return f"its --rotary-base takes whole numbers, and the model's base is {model.rotary_base}"
    scaling = dict(model.rope_scaling or {})
    if scaling.get("type") == "llama3" and any(scaling[name] != value for name, value in LLAMA3.items()):
        return "its --use-rope-scaling has the frequencies of Llama 3.1, and the model has others"
    if scaling.get("type") in ("yarn", "longrope"):
        return f"it has no argument for {scaling['type']} in a model with rotary positions"
    if model.no_rope_freq is not None:
        return "its --no-rope-freq takes every n-th layer, and the model names its layers without rotary embedding one by one"
    if model.sliding_window is not None:
        return f"its arguments for a window (--window-size) are not written, and the model has one of {model.sliding_window}"
    if scaling.get("type") == "linear" and scaling["factor"] != int(scaling["factor"]):
        return f"its --rotary-seq-len-interpolation-factor takes whole numbers, and the model's is {scaling['factor']}"
    return None


def command_line(model: ModelConfig, dtype: str) -> str:
    """Text of args.txt: the arguments of a dense model, one on each line. dtype: fp32, bf16 or fp16."""
    scaling = dict(model.rope_scaling or {})
    lines = [
        f"--num-layers {model.num_layers}",
        f"--hidden-size {model.hidden_size}",
        f"--ffn-hidden-size {model.ffn_hidden_size}",
        f"--num-attention-heads {model.num_attention_heads}",
        "--group-query-attention",
        f"--num-query-groups {model.num_query_groups}",
        f"--kv-channels {model.kv_channels}",
        f"--seq-length {model.max_position_embeddings}",
        f"--max-position-embeddings {model.max_position_embeddings}",
        f"--position-embedding-type {model.position_embedding_type}",
        f"--normalization {'RMSNorm' if model.normalization == 'rmsnorm' else 'LayerNorm'}",
        f"--norm-epsilon {model.layernorm_epsilon}",
        f"--init-method-std {model.init_method_std}",
        f"--hidden-dropout {model.hidden_dropout}",
        f"--attention-dropout {model.attention_dropout}",
        f"--vocab-size {model.vocab_size}",
        "--make-vocab-size-divisible-by 1",
        "--ckpt-format torch_dist",
    ]
    if model.position_embedding_type == "rope":
        lines.append(f"--rotary-base {int(model.rotary_base)}")
    if model.rotary_percent != 1:
        lines.append(f"--rotary-percent {model.rotary_percent}")
    if scaling.get("type") == "llama3":
        lines += ["--use-rope-scaling", f"--rope-scaling-factor {scaling['factor']}"]
    if scaling.get("type") == "linear":
        lines.append(f"--rotary-seq-len-interpolation-factor {int(scaling['factor'])}")
    if model.activation in ("swiglu", "squared-relu"):
        lines.append(f"--{model.activation}")
    if model.activation == "gelu":  # the fused kernel computes the tanh approximation
        lines.append("--no-bias-gelu-fusion")
    if model.add_qkv_bias:
        lines.append("--add-qkv-bias")
    if model.qk_layernorm:
        lines.append("--qk-layernorm")
    if not model.bias:
        lines.append("--disable-bias-linear")
    if not model.share_embeddings_and_output_weights:
        lines.append("--untie-embeddings-and-output-weights")
    if dtype != "fp32":
        lines.append(f"--{dtype}")
    return "\n".join(lines) + "\n"
