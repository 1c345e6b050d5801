"""Layer specs that make a stock Megatron-Core GPTModel elastic."""

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
from flextron_mcore.layers.norm import LayerNorm, RMSHeadNorm, RMSNorm
from flextron_mcore.layers.transformer_layer import ElasticTransformerLayer
from flextron_mcore.space import ElasticSpace

BACKENDS = ("local", "te")


def elastic_gpt_layer_spec(
    space: ElasticSpace, normalization: str = "RMSNorm", backend: str = "local", qk_layernorm: bool = False
) -> ModuleSpec:
    """Spec of one elastic Transformer layer. Its checkpoints have the keys of Megatron-Core's stock specs.

    Raises FlextronError for an unknown backend, and if Transformer Engine is needed and cannot be imported.

    Args:
        space: elastic space of the model.
        normalization: RMSNorm or LayerNorm, as in TransformerConfig.
        backend: `local`: torch's norms and scaled-dot-product attention. `te`: Transformer Engine's.
        qk_layernorm: normalise each head's query and key by RMSNorm, torch's in either backend.
    """
    norm, core_attention = backend_classes(normalization, backend)
    head_norm = RMSHeadNorm if qk_layernorm else None
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
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
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
            # Keys of the stock specs: norms are stored with the linear layer that follows them.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def elastic_gpt_block_spec(
    config: TransformerConfig, space: ElasticSpace, vp_stage: int | None = None, backend: str = "local"
) -> TransformerBlockSubmodules:
    """Spec of this pipeline stage's TransformerBlock: elastic layers, and a final norm that supports sequence parallelism.

    Args:
        config: TransformerConfig of the model.
        space: elastic space of the model.
        vp_stage: virtual pipeline stage; None without virtual stages.
        backend: `local` (torch's norms and attention) or `te` (Transformer Engine's).
    """
    layer = elastic_gpt_layer_spec(space, config.normalization, backend, config.qk_layernorm)
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    norm, _ = backend_classes(config.normalization, backend)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def backend_classes(normalization: str, backend: str = "local") -> tuple[type, type]:
    """(class of norms, class of core attention) of a backend. normalization: RMSNorm or LayerNorm, as in TransformerConfig.

    Raises FlextronError if the backend is unknown, or if it needs Transformer Engine and that cannot be imported.
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
    """Default elastic space for a TransformerConfig: 25, 50, 75, 100 % of heads and neurons, largest granularity that fits."""
    return ElasticSpace.build(architecture(config))


def architecture(config: TransformerConfig, vocab_size: int = 1, max_position_embeddings: int = 1) -> ModelConfig:
    """ModelConfig with the layer sizes of a TransformerConfig. Spaces and sub-networks depend on nothing else.

    Other fields, such as biases and tied embeddings, have their defaults, so it does not count the model's parameters.

    Args:
        config: TransformerConfig of the model.
        vocab_size: size of the vocabulary, which a TransformerConfig does not hold.
        max_position_embeddings: longest sequence in tokens, which a TransformerConfig does not hold.
    """
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
    """Spec of this pipeline stage's elastic layers of the backend `local`, for frameworks that call a function for it.

    Megatron-LM calls it through `--spec flextron_mcore.specs elastic_layer_spec`; Megatron-LM, Megatron-Bridge and NeMo 2 through
    `transformer_layer_spec`.

    Args:
        config: TransformerConfig, a subclass of it, or Megatron-LM's GPTModelConfig.
        vp_stage: virtual pipeline stage; None without virtual stages.
        space: elastic space; None for `default_space`.
    """
    config = getattr(config, "transformer", config)  # Megatron-LM's GPTModelConfig holds one
    return elastic_gpt_block_spec(config, space or default_space(config), vp_stage)


class DefaultElasticLayer(ElasticTransformerLayer):
    """Elastic layer over `default_space`, which builds the spec of its submodules (backend `local`) from its configuration."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        spec = elastic_gpt_layer_spec(default_space(config), config.normalization, qk_layernorm=config.qk_layernorm)
        super().__init__(config, spec.submodules, *args, **kwargs)


# ModuleSpec for frameworks that call no function (`gpt_builder` of Megatron-LM's model_provider).
elastic_layer = ModuleSpec(module=DefaultElasticLayer)
