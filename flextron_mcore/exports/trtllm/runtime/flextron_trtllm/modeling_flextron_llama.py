"""Llama whose layers have different widths, for TensorRT-LLM's PyTorch backend, built from its modules.

Loads the directory of `flextron export format=hf` if its config.json names FlextronLlamaForCausalLM. Written against the sources
of releases 1.0 to 1.4rc, and not run on a GPU (docs/tensorrt_llm.md of flextron_mcore).
"""

from tensorrt_llm._torch.models.checkpoints.hf.weight_mapper import HfWeightMapper
from tensorrt_llm._torch.models.modeling_utils import (
    DecoderModel,
    DecoderModelForCausalLM,
    register_auto_model,
    register_mapper,
)
from tensorrt_llm._torch.modules.decoder_layer import DecoderLayer
from tensorrt_llm._torch.modules.embedding import Embedding
from tensorrt_llm._torch.modules.gated_mlp import GatedMLP
from tensorrt_llm._torch.modules.linear import TensorParallelMode
from tensorrt_llm._torch.modules.rms_norm import RMSNorm
from tensorrt_llm.functional import PositionEmbeddingType
from torch import nn

try:  # release 1.4 moved attention
    from tensorrt_llm._torch.attention.attention import Attention
    from tensorrt_llm._torch.attention.backends.interface import PositionalEmbeddingParams, RopeParams
except ImportError:
    from tensorrt_llm._torch.attention_backend.interface import PositionalEmbeddingParams, RopeParams
    from tensorrt_llm._torch.modules.attention import Attention


class FlextronLlamaDecoderLayer(DecoderLayer):
    """Layer with the widths of one layer's configuration, `widths`."""

    def __init__(self, model_config, widths, layer_idx):
        super().__init__()
        config = model_config.pretrained_config
        norm = dict(hidden_size=config.hidden_size, eps=config.rms_norm_eps, dtype=config.torch_dtype)
        self.input_layernorm = RMSNorm(**norm)
        self.self_attn = Attention(  # it reads the size of a head from config.head_dim
            hidden_size=config.hidden_size,
            num_attention_heads=widths.num_attention_heads,
            num_key_value_heads=widths.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            bias=config.attention_bias,
            dense_bias=config.attention_bias,
            pos_embd_params=PositionalEmbeddingParams(
                type=PositionEmbeddingType.rope_gpt_neox, rope=RopeParams.from_config(config)
            ),
            layer_idx=layer_idx,
            dtype=config.torch_dtype,
            config=model_config,
        )
        self.post_attention_layernorm = RMSNorm(**norm)
        self.mlp = GatedMLP(
            hidden_size=config.hidden_size,
            intermediate_size=widths.intermediate_size,
            bias=config.mlp_bias,
            dtype=config.torch_dtype,
            config=model_config,
        )

    def forward(self, position_ids, hidden_states, attn_metadata, **kwargs):
        """Output hidden states of the layer. attn_metadata: TensorRT-LLM's AttentionMetadata; kwargs go to the attention."""
        attended = self.self_attn(
            position_ids=position_ids,
            hidden_states=self.input_layernorm(hidden_states),
            attn_metadata=attn_metadata,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class FlextronLlamaModel(DecoderModel):
    """Llama without its output layer."""

    def __init__(self, model_config):
        super().__init__(model_config)
        config = model_config.pretrained_config
        layers = [config.layer_config(i) for i in range(config.num_hidden_layers)]
        # The KV cache takes a list with a number for each layer. LlamaConfig of transformers 5 would refuse a list.
        object.__setattr__(config, "num_key_value_heads", [layer.num_key_value_heads for layer in layers])
        parallel = {}
        if not model_config.mapping.enable_attention_dp:  # split like the output layer, which may be the same tensor
            parallel = dict(mapping=model_config.mapping, tensor_parallel_mode=TensorParallelMode.COLUMN, gather_output=True)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=config.torch_dtype, **parallel)
        self.layers = nn.ModuleList(FlextronLlamaDecoderLayer(model_config, layer, i) for i, layer in enumerate(layers))
        self.norm = RMSNorm(hidden_size=config.hidden_size, eps=config.rms_norm_eps, dtype=config.torch_dtype)

    def forward(self, attn_metadata, input_ids=None, position_ids=None, inputs_embeds=None, **kwargs):
        """Hidden states after the final norm. Takes either token ids or embeddings; raises ValueError for both or neither."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden_states = layer(position_ids=position_ids, hidden_states=hidden_states, attn_metadata=attn_metadata)
        return self.norm(hidden_states)


@register_auto_model("FlextronLlamaForCausalLM")
class FlextronLlamaForCausalLM(DecoderModelForCausalLM):
    """Causal language model, registered for this architecture name of config.json."""

    def __init__(self, model_config):
        config = model_config.pretrained_config
        super().__init__(
            FlextronLlamaModel(model_config),
            config=model_config,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
        )


@register_mapper("HF", "FlextronLlamaForCausalLM")
class FlextronHfWeightMapper(HfWeightMapper):
    """Weight mapper that takes the number of KV heads from each layer's weights; the base class has one number for all."""

    def _duplicate_kv_weights(self, module, new_name, weights):
        """Weights with KV heads copied to several ranks, in layers with fewer KV heads than tensor-parallel ranks."""
        if new_name not in ("k_proj", "v_proj"):
            return weights
        return {name: self._copies(tensor[:]) if name in ("weight", "bias") else tensor for name, tensor in weights.items()}

    def _copies(self, tensor):
        """Key or value weight or bias with each KV head repeated, so that every tensor-parallel rank gets one."""
        size = self.model.config.head_dim
        heads = tensor.shape[0] // size
        if heads >= self._tp_size:
            return tensor
        return tensor.unflatten(0, (heads, size)).repeat_interleave(self._tp_size // heads, 0).flatten(0, 1)
