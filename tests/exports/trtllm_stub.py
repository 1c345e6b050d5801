"""Stand-in for the part of TensorRT-LLM's PyTorch backend that `flextron_trtllm` uses, in plain PyTorch on a CPU.

It has the constructors, fused weights and the weight mapper. It shows that shapes and wiring fit, not that an engine runs.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

MODELS: dict[str, type] = {}
MAPPERS: dict[tuple[str, str], type] = {}


class Linear(nn.Linear):
    def load_weights(self, weights: list[dict[str, torch.Tensor]]) -> None:
        """Load weights; several are fused, stacked along the rows."""
        for name, parameter in self.named_parameters():
            parameter.data.copy_(torch.cat([part[name] for part in weights]))


class Embedding(nn.Embedding):
    def __init__(self, rows, columns, dtype=None, mapping=None, tensor_parallel_mode=None, gather_output=False):
        super().__init__(rows, columns, dtype=dtype)
        self.tp_mode = tensor_parallel_mode


class RMSNorm(nn.Module):
    def __init__(self, *, hidden_size, eps, dtype=None):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(hidden_size, dtype=dtype)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class Attention(nn.Module):
    def __init__(
        self, *, hidden_size, num_attention_heads, num_key_value_heads, max_position_embeddings, bias, pos_embd_params=None,
        layer_idx=None, dtype=None, dense_bias=None, config=None,
    ):  # fmt: skip
        super().__init__()
        self.size = config.pretrained_config.head_dim
        self.rows = [heads * self.size for heads in (num_attention_heads, num_key_value_heads, num_key_value_heads)]
        self.qkv_proj = Linear(hidden_size, sum(self.rows), bias=bias, dtype=dtype)
        self.o_proj = Linear(self.rows[0], hidden_size, bias=bias if dense_bias is None else dense_bias, dtype=dtype)
        self.rope = pos_embd_params.rope
        self.layer_idx = layer_idx

    def forward(self, position_ids, hidden_states, attn_metadata):
        """Attention of one sequence, hidden_states [tokens, channels]."""
        parts = self.qkv_proj(hidden_states).split(self.rows, -1)
        q, k, v = (part.unflatten(-1, (-1, self.size)).transpose(0, 1)[None] for part in parts)
        q, k = apply_rotary_pos_emb(q, k, *self.rope(v, position_ids))
        attn_metadata.kv_cache[self.layer_idx] = k.shape[1]
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1))


class GatedMLP(nn.Module):
    def __init__(self, *, hidden_size, intermediate_size, bias, activation=F.silu, dtype=None, config=None):
        super().__init__()
        self.gate_up_proj = Linear(hidden_size, 2 * intermediate_size, bias=bias, dtype=dtype)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias, dtype=dtype)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class DecoderModel(nn.Module):
    def __init__(self, model_config):
        super().__init__()
        self.model_config = model_config


class DecoderModelForCausalLM(nn.Module):
    def __init__(self, model, *, config, hidden_size, vocab_size):
        super().__init__()
        self.model, self.model_config, self.config = model, config, config.pretrained_config
        self.lm_head = Linear(hidden_size, vocab_size, bias=False, dtype=config.pretrained_config.torch_dtype)
        if self.config.tie_word_embeddings:
            assert model.embed_tokens.tp_mode == "column"  # the output layer must be cut like the embedding
            self.lm_head.weight = model.embed_tokens.weight

    def forward(self, attn_metadata, input_ids, position_ids, **kwargs):
        hidden = self.model(
            input_ids=input_ids, attn_metadata=attn_metadata, position_ids=position_ids, inputs_embeds=None, spec_metadata=None
        )
        return self.lm_head(hidden)

    def load_weights(self, weights: dict[str, torch.Tensor], mapper: HfWeightMapper) -> None:
        """Load every parameter from the tensor of its name, or those it is fused from. Raises if a tensor is left over."""
        mapper.model, mapper._tp_size = self, self.model_config.mapping.tp_size
        left = dict(weights)
        for name, module in self.named_modules():
            if not module._parameters or (name == "lm_head" and self.config.tie_word_embeddings):
                continue
            path, last = name.rpartition(".")[::2]
            fused = []
            for part in {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}.get(last, [last]):
                prefix = f"{path}.{part}." if path else f"{part}."
                found = {key.removeprefix(prefix): left.pop(key) for key in [*left] if key.startswith(prefix)}
                fused.append(mapper._duplicate_kv_weights(module, part, found))
            if hasattr(module, "load_weights"):
                module.load_weights(fused)
            else:
                for key, parameter in module._parameters.items():
                    parameter.data.copy_(fused[0][key])
        assert not left, left.keys()


class HfWeightMapper:
    def _duplicate_kv_weights(self, module, new_name, weights):
        raise AssertionError("not of this model: the base class assumes one number of KV heads")


def register_auto_model(name: str):
    return lambda cls: MODELS.setdefault(name, cls)


def register_mapper(form: str, name: str):
    return lambda cls: MAPPERS.setdefault((form, name), cls)


def install(monkeypatch, moved: bool) -> None:
    """Put the stand-in in the place of tensorrt_llm. moved: attention is where release 1.4 has it."""

    def module(name: str, **content: Any) -> None:
        path = ""
        for part in name.split("."):
            path = f"{path}.{part}".lstrip(".")
            if path not in sys.modules:
                package = ModuleType(path)
                package.__path__ = []
                monkeypatch.setitem(sys.modules, path, package)
        vars(sys.modules[name]).update(content)

    MODELS.clear()
    MAPPERS.clear()
    base = "tensorrt_llm._torch."
    module("tensorrt_llm.functional", PositionEmbeddingType=SimpleNamespace(rope_gpt_neox="rope_gpt_neox"))
    module(
        base + "models.modeling_utils", DecoderModel=DecoderModel, DecoderModelForCausalLM=DecoderModelForCausalLM,
        register_auto_model=register_auto_model, register_mapper=register_mapper,
    )  # fmt: skip
    module(base + "models.checkpoints.hf.weight_mapper", HfWeightMapper=HfWeightMapper)
    module(base + "modules.decoder_layer", DecoderLayer=nn.Module)
    module(base + "modules.embedding", Embedding=Embedding)
    module(base + "modules.gated_mlp", GatedMLP=GatedMLP)
    module(base + "modules.linear", TensorParallelMode=SimpleNamespace(COLUMN="column"))
    module(base + "modules.rms_norm", RMSNorm=RMSNorm)
    rope = SimpleNamespace(from_config=lambda config: LlamaRotaryEmbedding(config=config.layer_config(0)))
    positions = {"PositionalEmbeddingParams": SimpleNamespace, "RopeParams": rope}
    module(base + ("attention.attention" if moved else "modules.attention"), Attention=Attention)
    module(base + ("attention.backends.interface" if moved else "attention_backend.interface"), **positions)
