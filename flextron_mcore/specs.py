"""The plug: layer specs that make a stock Megatron-Core GPTModel elastic."""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.random import HAVE_TE
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.layers.attention import ElasticOutputProjection, ElasticSelfAttention, SDPACoreAttention
from flextron_mcore.layers.linear import ElasticColumnParallelLinear, ElasticRowParallelLinear
from flextron_mcore.layers.mlp import ElasticMLP
from flextron_mcore.layers.norm import LayerNorm, RMSNorm
from flextron_mcore.layers.transformer_layer import ElasticTransformerLayer
from flextron_mcore.space import ElasticSpace

BACKENDS = ("local", "te")


def elastic_gpt_layer_spec(space: ElasticSpace, normalization: str = "RMSNorm", backend: str = "local") -> ModuleSpec:
    """Spec of one elastic Transformer layer.

    normalization: TransformerConfig's name, "RMSNorm" or "LayerNorm". backend: "local", torch's own norms and
    scaled-dot-product attention, or "te", Transformer Engine's. Keys of its checkpoints are those of the stock specs with both.
    Raises FlextronError where Transformer Engine cannot be imported.
    """
    norm, core_attention = backend_classes(normalization, backend)
    return ModuleSpec(
        module=ElasticTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=ElasticSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal, "space": space},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ElasticColumnParallelLinear,
                    core_attention=core_attention,
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
    config: TransformerConfig, space: ElasticSpace, vp_stage: int | None = None, backend: str = "local"
) -> TransformerBlockSubmodules:
    """Spec of this pipeline stage's block: elastic layers, and a final norm that knows sequence parallelism."""
    layer = elastic_gpt_layer_spec(space, config.normalization, backend)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    norm, _ = backend_classes(config.normalization, backend)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def backend_classes(normalization: str, backend: str = "local") -> tuple[type, type]:
    """(norm of TransformerConfig.normalization, core attention) of a backend.

    Raises FlextronError where the backend is not known or cannot be used.
    """
    if backend not in BACKENDS:
        raise FlextronError(f"backend={backend!r} is not known: use one of {', '.join(BACKENDS)}")
    rms = normalization == "RMSNorm"
    if backend == "local":
        return RMSNorm if rms else LayerNorm, SDPACoreAttention
    if not HAVE_TE:
        raise FlextronError("backend='te' needs Transformer Engine, which cannot be imported here: use 'local'")
    from flextron_mcore.layers import te  # imports Transformer Engine, which few machines have

    return te.TERMSNorm if rms else te.TELayerNorm, te.TECoreAttention


def default_space(config: TransformerConfig) -> ElasticSpace:
    """25, 50, 75 and 100 % of the heads and neurons of a TransformerConfig's model, at the largest granularity that fits."""
    return ElasticSpace.build(architecture(config))


def architecture(config: TransformerConfig, vocab_size: int = 1, max_position_embeddings: int = 1) -> ModelConfig:
    """ModelConfig with the sizes of a TransformerConfig's layers: a space and its sub-networks depend on nothing else."""
    return ModelConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        vocab_size=vocab_size,
        max_position_embeddings=max_position_embeddings,
        ffn_hidden_size=config.ffn_hidden_size,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        activation="swiglu" if config.gated_linear_unit else "gelu",
    )


def elastic_layer_spec(config: Any, vp_stage: int | None = None, space: ElasticSpace | None = None) -> TransformerBlockSubmodules:
    """The spec of this pipeline stage's elastic layers, for whatever calls a function with its configuration.

    That is Megatron-LM's `--spec flextron_mcore.specs elastic_layer_spec` and `transformer_layer_spec` of Megatron-LM,
    Megatron-Bridge and NeMo 2. config: a TransformerConfig, or what holds or extends one. space: by default `default_space`.
    """
    config = getattr(config, "transformer", config)  # Megatron-LM's GPTModelConfig holds one
    return elastic_gpt_block_spec(config, space or default_space(config), vp_stage)


class DefaultElasticLayer(ElasticTransformerLayer):
    """An elastic layer that finds its elastic submodules in its configuration, over `default_space`."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        spec = elastic_gpt_layer_spec(default_space(config), config.normalization)
        super().__init__(config, spec.submodules, *args, **kwargs)


# For a caller that takes a ModuleSpec and calls no function (`gpt_builder` of Megatron-LM's model_provider).
elastic_layer = ModuleSpec(module=DefaultElasticLayer)
