"""A dense model as arguments of Megatron-LM (its `pretrain_gpt.py`)."""

from __future__ import annotations

from flextron_mcore.config import ModelConfig
from flextron_mcore.space import SubNetwork

# Megatron-Core's defaults for the Llama 3 scaling of RoPE.
LLAMA3 = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def not_on_the_command_line(model: ModelConfig, net: SubNetwork) -> str | None:
    """Why Megatron-LM's arguments cannot describe the dense `model` of `net`; None if they can."""
    if not net.is_uniform:
        return "the layers differ, and its --heterogeneous-layers-config-path takes Nemotron's configurations only"
    if model.activation in ("relu", "geglu") or (model.activation == "gelu_tanh" and not model.bias):
        return f"they have no activation {model.activation}" + (" without biases" if model.activation == "gelu_tanh" else "")
    if model.position_embedding_type == "rope" and model.rotary_base != int(model.rotary_base):
        return f"--rotary-base is a whole number, this one's is {model.rotary_base}"
    scaling = dict(model.rope_scaling or {})
    if scaling.get("type") == "llama3" and any(scaling[name] != value for name, value in LLAMA3.items()):
        return "--use-rope-scaling is Llama 3.1's, and this model's has other frequencies"
    if scaling.get("type") == "linear" and scaling["factor"] != int(scaling["factor"]):
        return f"--rotary-seq-len-interpolation-factor is a whole number, this one's is {scaling['factor']}"
    return None


def command_line(model: ModelConfig, dtype: str) -> str:
    """The arguments, one a line."""
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
    if scaling.get("type") == "llama3":
        lines += ["--use-rope-scaling", f"--rope-scaling-factor {scaling['factor']}"]
    if scaling.get("type") == "linear":
        lines.append(f"--rotary-seq-len-interpolation-factor {int(scaling['factor'])}")
    if model.activation in ("swiglu", "squared-relu"):
        lines.append(f"--{model.activation}")
    if model.activation == "gelu":  # fused, it is the tanh approximation
        lines.append("--no-bias-gelu-fusion")
    if not model.bias:
        lines.append("--disable-bias-linear")
    if not model.share_embeddings_and_output_weights:
        lines.append("--untie-embeddings-and-output-weights")
    if dtype != "fp32":
        lines.append(f"--{dtype}")
    return "\n".join(lines) + "\n"
