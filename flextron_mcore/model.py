"""Construction of the elastic GPTModel of a ModelConfig."""

from __future__ import annotations

import functools
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import HAVE_TE
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from flextron_mcore.checkpoint.reader import load_model
from flextron_mcore.checkpoint.sharding import check_granularity
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.choosing import keep_states
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families.rope import longrope_frequencies, yarn_frequencies
from flextron_mcore.layers.ends import make_ends_elastic
from flextron_mcore.layers.gpt import ArchitectureGPTModel
from flextron_mcore.layers.rotary import LongRotaryEmbedding, set_rotary_scale
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.space import ElasticSpace
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
_BACKENDS = {"local": "local", "transformer_engine": "te"}  # {TransformerConfig.transformer_impl: backend of the layer spec}
# Dimension of a weight that is split over tensor-parallel ranks.
_SPLIT = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}


def transformer_config(
    model: ModelConfig,
    options: LayoutSettings | None = None,
    precision: str = "fp32",
    initialize: bool = True,
    **overrides: Any,
) -> TransformerConfig:
    """TransformerConfig of a model in a parallel layout.

    Raises FlextronError for an unknown precision or transformer_impl, and for combinations that Megatron-Core refuses.

    Args:
        model: architecture.
        options: parallel layout and recomputation; None for one rank.
        precision: fp32 or bf16.
        initialize: True to draw random weights; False if a checkpoint is loaded afterwards.
        overrides: fields of TransformerConfig that replace the values from the other arguments.
    """
    if precision not in PRECISIONS:
        raise FlextronError(f"precision {precision!r} is not known: use one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    options = options or LayoutSettings()
    values: dict[str, Any] = {each.name: getattr(options, each.name) for each in fields(LayoutSettings)}
    values = {name: value for name, value in values.items() if value is not None}
    if values["transformer_impl"] not in _BACKENDS:
        raise FlextronError(f"model.transformer_impl={values['transformer_impl']}: use one of {', '.join(_BACKENDS)}")
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
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        no_rope_freq=model.no_rope_freq and list(model.no_rope_freq),
        window_size=None if model.sliding_window is None else (model.sliding_window - 1, 0),
        window_attn_skip_freq=model.window_attn_skip_freq and list(model.window_attn_skip_freq),
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
    try:
        config = TransformerConfig(**values)
    except (AssertionError, ValueError) as error:  # a combination of options that Megatron-Core refuses
        raise FlextronError(f"model: {error}") from None
    set_rotary_scale(config, model.rotary_scale)
    return config


def build_model(
    model: ModelConfig,
    space: ElasticSpace,
    options: LayoutSettings | None = None,
    precision: str = "fp32",
    vp_stage: int | None = None,
    **overrides: Any,
) -> GPTModel:
    """Build this rank's part of the elastic GPTModel with random weights, on this rank's device.

    Call `flextron_mcore.initialize` first. Raises FlextronError for a layout that does not fit.

    Args:
        model: architecture of the full model.
        space: elastic space of the model.
        options: parallel layout and recomputation (settings/sections.py); None for one rank.
        precision: fp32 or bf16.
        vp_stage: virtual pipeline stage; None without virtual stages.
        overrides: fields of TransformerConfig.

    >>> initialize()
    >>> arch = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=67, max_position_embeddings=24)
    >>> model = build_model(arch, ElasticSpace.build(arch))
    >>> type(model).__mro__[1].__name__
    'GPTModel'
    """
    check_granularity(space.granularity, parallel_state.get_tensor_model_parallel_world_size())
    config = transformer_config(model, options, precision, **overrides)
    spec = elastic_gpt_block_spec(config, space, vp_stage, _BACKENDS[config.transformer_impl])
    gpt = gpt_model(model, config, spec, vp_stage)
    make_ends_elastic(gpt)
    gpt.decoder.register_forward_hook(keep_states)
    return gpt.to(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else gpt


def check_layout(model: ModelConfig, space: ElasticSpace, options: LayoutSettings, precision: str = "fp32") -> None:
    """Raise FlextronError naming the key to change unless a model can be built in a parallel layout.

    Args:
        model: architecture of the full model.
        space: elastic space of the model.
        options: parallel layout and recomputation.
        precision: fp32 or bf16.
    """
    check_granularity(space.granularity, options.tensor_model_parallel_size)
    stages = options.pipeline_model_parallel_size
    chunks = options.virtual_pipeline_model_parallel_size or 1
    ends = [options.num_layers_in_first_pipeline_stage, options.num_layers_in_last_pipeline_stage]
    given = [layers for layers in ends if layers is not None]
    middle, layers = stages - len(given), model.num_layers - sum(given)
    if middle < 0 or layers < 0 or (layers % middle if middle else layers) or any(n % chunks for n in given):
        raise FlextronError(
            f"model.pipeline_model_parallel_size={stages}: does not divide the model's {model.num_layers} layers"
            + (f" less the {sum(given)} of the first and last stage" if given else "")
            + ": choose one that does"
        )
    if middle and layers // middle % chunks:
        raise FlextronError(
            f"model.virtual_pipeline_model_parallel_size={chunks}: does not divide the {layers // middle} layers of a stage: "
            "choose one that does"
        )
    _check_recomputation(options)
    config = transformer_config(model, options, precision)
    sizes = {n // chunks for n in [*given, *([layers // middle] if middle else [])]}
    if config.recompute_method == "uniform" and any(size % config.recompute_num_layers for size in sizes):
        raise FlextronError(
            f"model.recompute_num_layers={config.recompute_num_layers}: does not divide the "
            f"{' or '.join(map(str, sorted(sizes)))} layers of a stage: choose one that does"
        )
    if config.transformer_impl == "transformer_engine" and not HAVE_TE:
        raise FlextronError(
            "model.transformer_impl=transformer_engine: it cannot be imported here: use local, or NVIDIA's container"
        )
    if config.recompute_granularity == "selective" and "layernorm" in config.recompute_modules and not HAVE_TE:
        raise FlextronError(
            "model.recompute_modules: layernorm needs Transformer Engine, which is not installed: remove layernorm from the list"
        )


def _check_recomputation(options: LayoutSettings) -> None:
    """Raise FlextronError for keys of recomputation that lack another, or that would have no effect."""
    kind, method, count = options.recompute_granularity, options.recompute_method, options.recompute_num_layers
    if kind == "full" and not (method and count):
        raise FlextronError(
            "model.recompute_granularity=full: needs model.recompute_method=uniform or block, and model.recompute_num_layers"
        )
    for name, value in (("recompute_method", method), ("recompute_num_layers", count)):
        if value is not None and kind != "full":
            raise FlextronError(
                f"model.{name}={value}: has an effect with model.recompute_granularity=full only: set both, or none"
            )
    if options.recompute_modules is not None and kind != "selective":
        raise FlextronError(
            "model.recompute_modules: has an effect with model.recompute_granularity=selective only: set both or none"
        )


def build_chunks(
    model: ModelConfig, space: ElasticSpace, options: LayoutSettings, precision: str = "fp32", **overrides: Any
) -> list[GPTModel]:
    """Build this rank's model chunks with random weights, one for each virtual pipeline stage (usually one).

    Args:
        model: architecture of the full model.
        space: elastic space of the model.
        options: parallel layout and recomputation.
        precision: fp32 or bf16.
        overrides: fields of TransformerConfig.
    """
    stages = options.virtual_pipeline_model_parallel_size
    if not stages:
        return [build_model(model, space, options, precision, **overrides)]
    # With two pipeline ranks, both neighbours are one rank, and gloo confuses the interleaved schedule's batched sends to it.
    overrides = {"overlap_p2p_comm": True, "batch_p2p_comm": False, **overrides}
    return [build_model(model, space, options, precision, stage, **overrides) for stage in range(stages)]


def loaded_model(options: LayoutSettings, info: CheckpointInfo, precision: str) -> list[torch.nn.Module]:
    """Load this rank's part of a checkpoint's model for evaluation: one chunk for each virtual pipeline stage, without gradients.

    Call on all ranks. Raises FlextronError for a damaged checkpoint, and for a layout that does not fit.

    Args:
        options: parallel layout.
        info: description of an opened checkpoint.
        precision: precision to compute in, fp32 or bf16.
    """
    chunks = build_chunks(info.model, info.space, options, precision, initialize=False)
    for gpt in chunks:
        load_model(gpt.requires_grad_(False), info)
    return [(Float16Module(gpt.config, gpt) if precision == "bf16" else gpt).eval() for gpt in chunks]


def gpt_model(
    model: ModelConfig, config: TransformerConfig, spec: ModuleSpec | TransformerBlockSubmodules, vp_stage: int | None = None
) -> GPTModel:
    """Build this rank's part of a GPTModel from any layer or block spec, elastic or not, with random weights.

    Args:
        model: architecture.
        config: TransformerConfig of the architecture.
        spec: spec of a layer or of this pipeline stage's block.
        vp_stage: virtual pipeline stage; None without virtual stages.
    """
    linear_factor = None
    if model.rope_scaling and model.rope_scaling["type"] == "linear":
        linear_factor = float(model.rope_scaling["factor"])
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    gpt = ArchitectureGPTModel(
        config,
        spec,
        # Padded, because ranks hold equal parts of the vocabulary.
        vocab_size=-(-model.vocab_size // tensor_parallel) * tensor_parallel,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=model.share_embeddings_and_output_weights,
        position_embedding_type=model.position_embedding_type,
        rotary_base=model.rotary_base,
        rotary_percent=model.rotary_percent,
        seq_len_interpolation_factor=linear_factor,
        vp_stage=vp_stage,
    )
    gpt.architecture = model
    for module in gpt.modules():
        # Megatron-Core 0.16 does not mark weights that it does not initialise. The gradient norm would leave out parts of them.
        dim = next((dim for kind, dim in _SPLIT.items() if isinstance(module, kind)), None)
        if dim is not None and module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)
    if model.rope_scaling and model.rope_scaling["type"] == "llama3":
        # GPTModel takes only the factor as an argument.
        rope, scaling = gpt.rotary_pos_emb, model.rope_scaling
        rope.inv_freq = rope._apply_scaling(
            rope.inv_freq,
            factor=float(scaling["factor"]),
            low_freq_factor=float(scaling["low_freq_factor"]),
            high_freq_factor=float(scaling["high_freq_factor"]),
            original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
        )
    if frequencies := yarn_frequencies(model):
        gpt.rotary_pos_emb.inv_freq = gpt.rotary_pos_emb.inv_freq.new_tensor(frequencies)
    if both := longrope_frequencies(model):
        gpt.rotary_pos_emb = LongRotaryEmbedding(gpt.rotary_pos_emb, *both, model.short_context)
    return gpt
