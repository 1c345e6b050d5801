"""Build a GPTModel from a ModelConfig, and choose the sub-network it computes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
from megatron.core.transformer.transformer_config import TransformerConfig

from flextron_mcore.checkpoint.reader import load_model
from flextron_mcore.checkpoint.sharding import check_granularity
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.layers.dispatch import BlockRouting, Routing
from flextron_mcore.layers.linear import ElasticEmbedding, ElasticOutputLayer, ElasticPositions
from flextron_mcore.layers.weighted import WeightedNetwork, mask
from flextron_mcore.space import ElasticSpace, LayerChoice, SubNetwork, parameter_share
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
_BACKENDS = {"local": "local", "transformer_engine": "te"}  # TransformerConfig.transformer_impl -> the spec's backend
# The dimension of a weight that is split over tensor-parallel ranks.
_SPLIT = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
# Options of TransformerConfig that a run's `model` section may set, under Megatron-Core's own names.
# transformer_impl picks the spec's backend.
PARALLEL_OPTIONS = (
    "transformer_impl",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
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
    if values.setdefault("transformer_impl", "local") not in _BACKENDS:
        raise FlextronError(f"model.transformer_impl={values['transformer_impl']}: use one of {', '.join(_BACKENDS)}")
    if "recompute_modules" in values:
        values["recompute_modules"] = list(values["recompute_modules"])
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
    try:
        return TransformerConfig(**values)
    except (AssertionError, ValueError) as error:  # what Megatron-Core thinks of a combination of options
        raise FlextronError(f"model: {error}") from None


def build_model(
    model: ModelConfig,
    space: ElasticSpace,
    options: Mapping[str, Any] | None = None,
    precision: str = "fp32",
    vp_stage: int | None = None,
    **overrides: Any,
) -> GPTModel:
    """This rank's part of the elastic GPTModel, freshly initialised, on this rank's device."""
    check_granularity(space.granularity, parallel_state.get_tensor_model_parallel_world_size())
    config = transformer_config(model, options, precision, **overrides)
    spec = elastic_gpt_block_spec(config, space, vp_stage, _BACKENDS[config.transformer_impl])
    gpt = gpt_model(model, config, spec, vp_stage)
    # GPTModel makes its own ends; the parameters are the same.
    if gpt.pre_process:
        ends = [(gpt.embedding.word_embeddings, ElasticEmbedding)]
        if gpt.embedding.add_position_embedding:
            ends.append((gpt.embedding.position_embeddings, ElasticPositions))
        for end, kind in ends:
            end.__class__, end.channels = kind, functools.partial(_channels_of_first_layer, gpt.decoder.layers)
        gpt.embedding.word_embeddings.weight.zero_out_wgrad = False  # nor is it read where the output layer shares the weight
    if gpt.post_process:
        gpt.output_layer.__class__ = ElasticOutputLayer
    gpt.decoder.register_forward_hook(keep_choices)
    return gpt.to(torch.device("cuda", torch.cuda.current_device())) if torch.cuda.is_available() else gpt


def _channels_of_first_layer(layers: Sequence[Any]) -> int | None:
    """How many channels of an embedding are used, None for all."""
    return layers[0].channels[0] if len(layers) and layers[0].channels else None


def check_layout(model: ModelConfig, space: ElasticSpace, options: Mapping[str, Any], precision: str = "fp32") -> None:
    """Raise FlextronError, naming the key, unless `model` can be built in the layout of `options` (PARALLEL_OPTIONS)."""
    check_granularity(space.granularity, options.get("tensor_model_parallel_size") or 1)
    stages = options.get("pipeline_model_parallel_size") or 1
    chunks = options.get("virtual_pipeline_model_parallel_size") or 1
    ends = [options.get(f"num_layers_in_{end}_pipeline_stage") for end in ("first", "last")]
    given = [layers for layers in ends if layers is not None]
    middle, layers = stages - len(given), model.num_layers - sum(given)
    if middle < 0 or layers < 0 or (layers % middle if middle else layers) or any(n % chunks for n in given):
        raise FlextronError(
            f"model.pipeline_model_parallel_size={stages}: does not divide the model's {model.num_layers} layers"
            + (f" less the {sum(given)} of the first and last stage" if given else "")
        )
    if middle and layers // middle % chunks:
        raise FlextronError(
            f"model.virtual_pipeline_model_parallel_size={chunks}: does not divide the {layers // middle} layers of a stage"
        )
    config = transformer_config(model, options, precision)
    sizes = {n // chunks for n in [*given, *([layers // middle] if middle else [])]}
    if config.recompute_method == "uniform" and any(size % config.recompute_num_layers for size in sizes):
        raise FlextronError(
            f"model.recompute_num_layers={config.recompute_num_layers}: does not divide the "
            f"{' or '.join(map(str, sorted(sizes)))} layers of a stage"
        )
    if config.transformer_impl == "transformer_engine" and not HAVE_TE:
        raise FlextronError(
            "model.transformer_impl=transformer_engine: it cannot be imported here: use local, or NVIDIA's container"
        )
    if config.recompute_granularity == "selective" and "layernorm" in config.recompute_modules and not HAVE_TE:
        raise FlextronError("model.recompute_modules: layernorm needs Transformer Engine, which is not installed")


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


def loaded_model(options: Mapping[str, Any], info: CheckpointInfo, precision: str) -> list[torch.nn.Module]:
    """This rank's part of the checkpoint's model, a chunk for each of its virtual pipeline stages, ready for evaluation.

    options: the `model` section with the layout. No weight wants a gradient.
    """
    chunks = build_chunks(info.model, info.space, options, precision, initialize=False)
    for gpt in chunks:
        load_model(gpt.requires_grad_(False), info)
    return [(Float16Module(gpt.config, gpt) if precision == "bf16" else gpt).eval() for gpt in chunks]


def gpt_model(model: ModelConfig, config: TransformerConfig, spec: Any, vp_stage: int | None = None) -> GPTModel:
    """A GPTModel of `model` from any layer or block spec."""
    linear_factor = None
    if model.rope_scaling and model.rope_scaling["type"] == "linear":
        linear_factor = float(model.rope_scaling["factor"])
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    gpt = _GPTModel(
        config,
        spec,
        # Ranks hold equal parts of the vocabulary.
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
    gpt.architecture = model
    for module in gpt.modules():
        # Megatron-Core 0.16 forgets to mark weights that it does not initialise; gradient norms would leave parts of them out.
        dim = next((dim for kind, dim in _SPLIT.items() if isinstance(module, kind)), None)
        if dim is not None and module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, is_parallel=True, dim=dim, stride=1)
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


class _GPTModel(GPTModel):
    """A GPTModel whose loss does not see the padding of the vocabulary, which depends on the layout."""

    architecture: ModelConfig

    @property
    def real_vocab_size(self) -> int:
        return self.architecture.vocab_size

    def compute_language_model_loss(self, labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return super().compute_language_model_loss(labels, mask_padding(logits, self.real_vocab_size))


def mask_padding(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Logits [..., V of this rank] with a probability of zero for the rows that pad the vocabulary to equal parts."""
    part = logits.shape[-1]
    real = vocab_size - parallel_state.get_tensor_model_parallel_rank() * part
    if real >= part:
        return logits
    return logits.masked_fill(torch.arange(part, device=logits.device) >= real, -1e9)


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside Megatron-Core's wrappers (DDP, Float16Module)."""
    while hasattr(model, "module"):
        model = model.module
    return model


Network = SubNetwork | Routing | WeightedNetwork | None


def set_subnetwork(model: torch.nn.Module, net: Network, gates: Sequence[torch.Tensor] | None = None) -> None:
    """Make `model` compute `net` from now on; None for the full model.

    A Routing chooses token by token, a WeightedNetwork computes everything and weighs it. gates: a scalar for each block (layer
    l's attention at 2 l, its MLP at 2 l + 1) that its output is multiplied with.
    """
    gpt = unwrap(model)
    layers, final = gpt.decoder.layers, None
    choices = [_Choice(gates=tuple(gates[2 * i : 2 * i + 2])) if gates else _Choice() for i in _numbers(layers)]
    if isinstance(net, SubNetwork):
        _check(gpt, net)
        share, pairs = _share(gpt, net), zip(_numbers(layers), choices, strict=True)
        choices = [replace(choice, widths=net.layers[i], share=share) for i, choice in pairs]
        if net.hidden_size < gpt.config.hidden_size:
            choices = [replace(choice, channels=(net.hidden_size,) * 2) for choice in choices]
            if choices and not gpt.post_process:
                choices[-1] = replace(choices[-1], channels=(net.hidden_size, gpt.config.hidden_size))
    elif isinstance(net, WeightedNetwork):
        space: ElasticSpace = layers[0].mlp.space
        final = mask(net.hidden_K, space.hidden_size)
        choices = [_weighted(layer, net, final) for layer in layers]
    elif net is not None:
        if _modulated(gpt):
            raise FlextronError("tokens that choose for themselves are no network: a model with modulation has no gains for them")
        choices = [
            replace(choice, routing=(net.block(2 * i), net.block(2 * i + 1)))
            for i, choice in zip(_numbers(layers), choices, strict=True)
        ]
    _set_choices(gpt.decoder, (choices, final))


@contextlib.contextmanager
def use_subnetwork(model: torch.nn.Module, net: Network) -> Iterator[None]:
    """Inside the context `model` computes `net`, as in `set_subnetwork`; the choice before it is restored after."""
    decoder = unwrap(model).decoder
    before = _choices(decoder)
    set_subnetwork(model, net)
    try:
        yield
    finally:
        _set_choices(decoder, before)


@dataclass(frozen=True, eq=False)
class _Choice:
    """What is set on a layer: on itself, and pairs for its attention and its MLP."""

    channels: tuple[int, int] | None = None
    widths: LayerChoice | None = None
    gates: tuple[torch.Tensor | None, ...] = (None, None)
    routing: tuple[BlockRouting | None, ...] = (None, None)
    masks: tuple[torch.Tensor | None, ...] = (None, None)
    norm_mask: torch.Tensor | None = None
    share: float | None = None


def _numbers(layers: Sequence[Any]) -> list[int]:
    return [layer.layer_number - 1 for layer in layers]


def _check(gpt: GPTModel, net: SubNetwork) -> None:
    full = gpt.config.hidden_size
    if len(net.layers) != gpt.config.num_layers:
        raise FlextronError(f"sub-network has {len(net.layers)} layers, the model has {gpt.config.num_layers}")
    if not 0 < net.hidden_size <= full:
        raise FlextronError(f"sub-network has hidden_size {net.hidden_size}, the model has {full}")
    if net.hidden_size < full and gpt.post_process and not isinstance(gpt.output_layer, ElasticOutputLayer):
        raise FlextronError(f"hidden_size {net.hidden_size} < {full}: wants a model of flextron_mcore.model.build_model")


def _modulated(gpt: GPTModel) -> bool:
    return any(layer.mlp.modulation is not None for layer in gpt.decoder.layers)


def _share(gpt: GPTModel, net: SubNetwork) -> float | None:
    """What `net` has of the parameters, where blocks are modulated by it."""
    if not _modulated(gpt):
        return None
    if not isinstance(gpt, _GPTModel):
        raise FlextronError("a space with modulation wants a model of flextron_mcore.model.build_model")
    return parameter_share(gpt.architecture, net)


def _weighted(layer: Any, net: WeightedNetwork, norm_mask: torch.Tensor) -> _Choice:
    i, attention, mlp = layer.layer_number - 1, layer.self_attention, layer.mlp
    space: ElasticSpace = mlp.space
    neurons = mask(net.neurons_LK[i], [size // mlp.tensor_parallel_size for size in space.ffn_hidden_size])
    if space.attention_unit == "kv_group":
        groups = [size // attention.group_size // attention.world_size for size in space.heads]
        heads = mask(net.heads_LK[i], groups).repeat_interleave(attention.group_size)
    else:
        queries = [size // attention.config.num_query_groups for size in space.heads]
        heads = mask(net.heads_LK[i], queries).repeat(attention.num_query_groups_per_partition)
    gate = net.layers_L[i]
    return _Choice(gates=(gate, gate), masks=(heads, neurons), norm_mask=norm_mask, share=net.share)


def _choices(decoder: torch.nn.Module) -> tuple[list[_Choice], torch.Tensor | None]:
    """What is set on the layers, and on the final norm."""
    found = []
    for layer in decoder.layers:
        blocks = (layer.self_attention, layer.mlp)
        pairs = [tuple(getattr(block, name) for block in blocks) for name in ("gate", "routing", "mask")]
        norm_mask = getattr(layer.input_layernorm, "mask", None)
        found.append(_Choice(layer.channels, layer.mlp.choice, *pairs, norm_mask, layer.mlp.share))
    return found, getattr(decoder.final_layernorm, "mask", None)


def _set_choices(decoder: torch.nn.Module, chosen: tuple[Sequence[_Choice], torch.Tensor | None]) -> None:
    choices, final = chosen
    for layer, choice in zip(decoder.layers, choices, strict=True):
        blocks = (layer.self_attention, layer.mlp)
        layer.channels = choice.channels
        for block, gate, routing, units in zip(blocks, choice.gates, choice.routing, choice.masks, strict=True):
            block.choice, block.gate, block.routing, block.mask = choice.widths, gate, routing, units
            block.share = choice.share
        layer.input_layernorm.mask = layer.pre_mlp_layernorm.mask = choice.norm_mask
    if decoder.final_layernorm is not None:
        decoder.final_layernorm.mask = final


def keep_choices(decoder: torch.nn.Module, args: Any, hidden_states: torch.Tensor) -> None:
    """Forward hook of the layers' block: its backward pass sees the choices of this forward pass.

    Activation recomputation runs layers again in the backward pass. By then the choices of another micro-batch are set: with
    pipeline parallelism several are in flight.
    """
    if decoder.config.recompute_granularity is None or not hidden_states.requires_grad:
        return
    captured = _choices(decoder)

    def restore(grad: torch.Tensor) -> None:  # the first thing that happens in the block's backward pass
        current = _choices(decoder)
        _set_choices(decoder, captured)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _set_choices(decoder, current))

    hidden_states.register_hook(restore)
