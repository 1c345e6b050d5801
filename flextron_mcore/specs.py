"""The plug: layer specs that make a stock Megatron-Core GPTModel elastic."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from flextron_mcore.config import FlextronError
from flextron_mcore.layers.attention import ElasticOutputProjection, ElasticSelfAttention, SDPACoreAttention
from flextron_mcore.layers.linear import ElasticColumnParallelLinear, ElasticRowParallelLinear
from flextron_mcore.layers.mlp import ElasticMLP
from flextron_mcore.layers.norm import LayerNorm, RMSNorm
from flextron_mcore.space import ElasticSpace


def elastic_gpt_layer_spec(space: ElasticSpace, normalization: str = "RMSNorm", backend: str = "local") -> ModuleSpec:
    """Spec of one elastic Transformer layer.

    normalization: TransformerConfig's name, "RMSNorm" or "LayerNorm". backend: "local", torch's own norms and
    scaled-dot-product attention. Keys of its checkpoints are those of the stock specs.
    """
    if backend != "local":
        raise FlextronError(f"backend={backend!r} is not available: use 'local'")
    norm = norm_class(normalization)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=ElasticSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal, "space": space},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ElasticColumnParallelLinear,
                    core_attention=SDPACoreAttention,
                    linear_proj=ElasticOutputProjection,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(
                module=ElasticMLP,
                params={"space": space},
                submodules=MLPSubmodules(linear_fc1=ElasticColumnParallelLinear, linear_fc2=ElasticRowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            # Stock names on disk: the norms' parameters are stored with the linear layer that follows them.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def elastic_gpt_block_spec(
    config: TransformerConfig, space: ElasticSpace, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Spec of this pipeline stage's block: elastic layers, and a final norm that knows sequence parallelism."""
    layer = elastic_gpt_layer_spec(space, config.normalization)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm_class(config.normalization))


def norm_class(normalization: str) -> type:
    """The local backend's class for TransformerConfig.normalization."""
    return RMSNorm if normalization == "RMSNorm" else LayerNorm
