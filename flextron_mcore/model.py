"""Build a GPTModel from a ModelConfig, and choose the sub-network it computes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from flextron_mcore.checkpoint.sharding import check_layout
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.space import ElasticSpace, SubNetwork
from flextron_mcore.specs import elastic_gpt_block_spec

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "squared-relu": squared_relu,
    "swiglu": F.silu,
    "geglu": F.gelu,
}
# Options of TransformerConfig that a run's `model` section may set, under Megatron-Core's own names.
PARALLEL_OPTIONS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
)


def transformer_config(
    model: ModelConfig,
    options: Mapping[str, Any] | None = None,
    precision: str = "fp32",
    initialize: bool = True,
    **overrides: Any,
) -> TransformerConfig:
    """TransformerConfig of `model`; `options` may hold any of PARALLEL_OPTIONS. initialize: whether weights get random values."""
    if precision not in PRECISIONS:
        raise FlextronError(f"precision {precision!r} is not known: use one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    values: dict[str, Any] = {k: options[k] for k in PARALLEL_OPTIONS if options and options.get(k) is not None}
    values.update(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        gated_linear_unit=model.gated,
        activation_func=_ACTIVATIONS[model.activation],
        normalization="RMSNorm" if model.normalization == "rmsnorm" else "LayerNorm",
        layernorm_zero_centered_gamma=model.normalization == "layernorm1p",
        layernorm_epsilon=model.layernorm_epsilon,
        add_bias_linear=model.bias,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        init_method_std=model.init_method_std,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        use_cpu_initialization=not torch.cuda.is_available(),
        calculate_per_token_loss=True,
        perform_initialization=initialize,
        hetereogenous_dist_checkpoint=True,  # Megatron-Core's spelling; one key a layer instead of stacked layers
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    values.update(overrides)
    return TransformerConfig(**values)


def build_model(
    model: ModelConfig,
    space: ElasticSpace,
    options: Mapping[str, Any] | None = None,
    precision: str = "fp32",
    vp_stage: int | None = None,
    **overrides: Any,
) -> GPTModel:
    """This rank's part of the elastic GPTModel, freshly initialised, on this rank's device."""
    check_layout(space.granularity, parallel_state.get_tensor_model_parallel_world_size())
    config = transformer_config(model, options, precision, **overrides)
    gpt = gpt_model(model, config, elastic_gpt_block_spec(config, space, vp_stage), vp_stage)
    return gpt.to(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else gpt


def build_chunks(
    model: ModelConfig, space: ElasticSpace, options: Mapping[str, Any], precision: str = "fp32", **overrides: Any
) -> list[GPTModel]:
    """This rank's virtual pipeline stages, usually one."""
    stages = options.get("virtual_pipeline_model_parallel_size")
    if not stages:
        return [build_model(model, space, options, precision, **overrides)]
    # With two pipeline ranks the batched sends of the interleaved schedule cross on gloo.
    overrides = {"overlap_p2p_comm": True, "batch_p2p_comm": False, **overrides}
    return [build_model(model, space, options, precision, stage, **overrides) for stage in range(stages)]


def gpt_model(model: ModelConfig, config: TransformerConfig, spec: Any, vp_stage: int | None = None) -> GPTModel:
    """A GPTModel of `model` from any layer or block spec."""
    linear_factor = None
    if model.rope_scaling and model.rope_scaling["type"] == "linear":
        linear_factor = float(model.rope_scaling["factor"])
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    gpt = GPTModel(
        config,
        spec,
        # Ranks hold equal parts of the vocabulary; rows beyond the real one are never a target.
        vocab_size=-(-model.vocab_size // tensor_parallel) * tensor_parallel,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_base=model.rotary_base,
        seq_len_interpolation_factor=linear_factor,
        vp_stage=vp_stage,
    )
    if model.rope_scaling and model.rope_scaling["type"] == "llama3":
        # GPTModel takes the factor only; the function that applies the rest is Megatron-Core's too.
        rope, scaling = gpt.rotary_pos_emb, model.rope_scaling
        rope.inv_freq = rope._apply_scaling(
            rope.inv_freq,
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
        )
    return gpt


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside Megatron-Core's wrappers (DDP, Float16Module)."""
    while hasattr(model, "module"):
        model = model.module
    return model


def set_subnetwork(model: torch.nn.Module, net: SubNetwork | None) -> None:
    """Make `model` compute `net` from now on; None for the full model."""
    gpt = unwrap(model)
    if net is not None:
        if len(net.layers) != gpt.config.num_layers:
            raise FlextronError(f"sub-network has {len(net.layers)} layers, the model has {gpt.config.num_layers}")
        if net.hidden_size != gpt.config.hidden_size:
            raise FlextronError(
                f"hidden_size {net.hidden_size} < {gpt.config.hidden_size}: elastic hidden size is not implemented yet"
            )
        if not all(layer.executed for layer in net.layers):
            raise FlextronError("a sub-network that skips layers: elastic depth is not implemented yet")
    for layer in gpt.decoder.layers:
        choice = None if net is None else net.layers[layer.layer_number - 1]
        layer.self_attention.choice = choice
        layer.mlp.choice = choice


@contextlib.contextmanager
def use_subnetwork(model: torch.nn.Module, net: SubNetwork | None) -> Iterator[None]:
    """Inside the context `model` computes `net` (None: the full model); the choice before it is restored after."""
    layers = unwrap(model).decoder.layers
    before = [(layer.self_attention.choice, layer.mlp.choice) for layer in layers]
    set_subnetwork(model, net)
    try:
        yield
    finally:
        for layer, (attention, mlp) in zip(layers, before, strict=True):
            layer.self_attention.choice, layer.mlp.choice = attention, mlp
