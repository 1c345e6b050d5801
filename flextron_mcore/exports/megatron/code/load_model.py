"""Builds the model in this directory from Megatron-Core's own layers, and loads its weights.

    import load_model                     # after parallel_state.initialize_model_parallel and seeding of the random states
    model = load_model.load(bf16=True)    # this rank's part, a GPTModel; takes all arguments of TransformerConfig

`model_config.json` has the sizes. If the layers have different widths, these are in its `block_configs`, in the form of
Megatron-Core's HeterogeneousTransformerConfig. That form has no number of query heads and no factor of rotary embeddings; where
one is needed, `PerLayerConfig` adds it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

DIRECTORY = Path(__file__).resolve().parent
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "squared-relu": squared_relu,
    "swiglu": F.silu,
    "geglu": F.gelu,
}
# Switches off fused kernels that need a GPU or compute another function (the fused GELU is the tanh approximation).
PLAIN = {
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
    "apply_rope_fusion": False,
}


@dataclasses.dataclass
class PerLayerConfig(HeterogeneousTransformerConfig):
    """HeterogeneousTransformerConfig whose block_configs may also give each layer's num_attention_heads.

    Layers get the factor of rotary embeddings that `scaled` has set on it.
    """

    def get_config_for_layer(self, layer_number: int) -> TransformerConfig:
        """TransformerConfig of a layer; layers count from 1."""
        block = json.loads(self.heterogeneous_layers_config_encoded_json)["block_configs"][layer_number - 1]
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(TransformerConfig)}
        values["num_attention_heads"] = block["attention"].get("num_attention_heads", self.num_attention_heads)
        values["num_query_groups"] = block["attention"]["num_query_groups"]
        values["ffn_hidden_size"] = block["mlp"]["ffn_hidden_size"]
        return scaled(TransformerConfig(**values), getattr(self, "yarn_mscale", 0.0) + 1)


def scaled(config: TransformerConfig, scale: float) -> TransformerConfig:
    """Make Megatron-Core's attention multiply the cosines and sines of rotary embeddings with `scale`; return the configuration.

    Megatron-Core reads the attributes set here for its own YaRN: its factor is
    0.1 * yarn_mscale * ln(yarn_rotary_scaling_factor) + 1.
    """
    if scale != 1:
        config.yarn_rotary_scaling_factor, config.yarn_mscale, config.yarn_mscale_all_dim = math.exp(10), scale - 1, 0.0
    return config


class LongRotaryEmbedding(RotaryEmbedding):
    """Rotary embedding of LongRoPE: frequencies `short` up to `original` positions, and `long` for longer sequences.

    With a KV cache the length is the number of all tokens so far. Compute earlier tokens again when a text grows beyond
    `original`.
    """

    def __init__(self, plain: RotaryEmbedding, short: list[float], long: list[float], original: int) -> None:
        torch.nn.Module.__init__(self)
        self.rotary_interleaved, self.cp_group = plain.rotary_interleaved, plain.cp_group
        self.seq_len_interpolation_factor, self.inv_freq = None, plain.inv_freq
        self.frequencies, self.original = [plain.inv_freq.new_tensor(values) for values in (short, long)], original

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        """Rotary angles [max_seq_len, 1, 1, rotated channels] of the positions from `offset` on."""
        self.inv_freq = self.frequencies[offset + max_seq_len > self.original]
        return super().get_emb(max_seq_len, offset)

    def get_rotary_seq_len(self, inference_context: Any, *args: Any, **kwargs: Any) -> int:
        """Number of positions to compute angles for: at most `original`, unless the sequence so far is longer."""
        most, context = super().get_rotary_seq_len(inference_context, *args, **kwargs), inference_context
        if context is None:
            return most
        end = context.sequence_len_offset + super().get_rotary_seq_len(None, *args, **kwargs)
        return most if end > self.original else min(most, self.original)


def read() -> dict[str, Any]:
    """Content of model_config.json."""
    return json.loads((DIRECTORY / "model_config.json").read_text(encoding="utf-8"))


def transformer_config(**changes: Any) -> TransformerConfig:
    """TransformerConfig of this directory's model. changes: further arguments of it, such as precision and parallel sizes."""
    model = read()
    values = {
        **model["transformer_config"],
        "activation_func": ACTIVATIONS[model["activation"]],
        "hetereogenous_dist_checkpoint": True,  # Megatron-Core's spelling; the checkpoint has one key a layer
        **PLAIN,
        **changes,
    }
    values["window_size"] = values["window_size"] and tuple(values["window_size"])  # JSON has no tuples
    if model["block_configs"] is None:
        return scaled(TransformerConfig(**values), model["rotary_scale"])
    values["heterogeneous_layers_config_encoded_json"] = json.dumps({"block_configs": model["block_configs"]})
    kind = PerLayerConfig if model["query_heads_differ"] or model["rotary_scale"] != 1 else HeterogeneousTransformerConfig
    return scaled(kind(**values), model["rotary_scale"])


def build(use_te: bool = False, **changes: Any) -> GPTModel:
    """GPTModel of this rank with random weights.

    Args:
        use_te: True for Transformer Engine's layers, False for Megatron-Core's local ones.
        changes: further arguments of TransformerConfig.
    """
    model, config = read(), transformer_config(**changes)
    if model["block_configs"] is not None:
        spec = get_gpt_heterogeneous_layer_spec(config, use_te)
    elif use_te:
        spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization=config.normalization)
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    options = dict(model["gpt_model"])
    options["vocab_size"] = -(-options["vocab_size"] // ranks) * ranks  # pad to equal parts
    gpt = GPTModel(
        config,
        spec,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        **options,
    )
    if model["rope_scaling"] is not None:  # scaling of Llama 3 with values that GPTModel does not take
        gpt.rotary_pos_emb.inv_freq = gpt.rotary_pos_emb._apply_scaling(gpt.rotary_pos_emb.inv_freq, **model["rope_scaling"])
    if model["rotary_frequencies"] is not None:  # YaRN
        gpt.rotary_pos_emb.inv_freq = gpt.rotary_pos_emb.inv_freq.new_tensor(model["rotary_frequencies"])
    if model["longrope"] is not None:
        gpt.rotary_pos_emb = LongRotaryEmbedding(gpt.rotary_pos_emb, **model["longrope"])
    return gpt


def load(use_te: bool = False, **changes: Any) -> GPTModel:
    """GPTModel of this rank, with weights from the checkpoint in this file's directory. Call on all ranks.

    Args:
        use_te: True for Transformer Engine's layers, False for Megatron-Core's local ones.
        changes: further arguments of TransformerConfig, such as precision and parallel sizes.
    """
    gpt = build(use_te, **changes)
    wanted = gpt.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    names = list(wanted)
    loaded = dist_checkpointing.load(wanted, str(DIRECTORY / read()["checkpoint"]))
    gpt.load_state_dict({name: loaded[name] for name in names})
    return gpt


def logits(gpt: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, this rank's part of the padded vocabulary] of tokens [batch, sequence].

    Needs a single pipeline stage.
    """
    length = tokens.shape[1]
    positions = torch.arange(length, device=tokens.device).expand_as(tokens)
    future = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)[None, None]
    return gpt(tokens, positions, future)
