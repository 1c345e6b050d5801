"""Choice of the network that a built model computes. Only this file sets the `LayerState` of layers (layers/state.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from megatron.core.models.gpt import GPTModel

from flextron_mcore.axes import layer_axes
from flextron_mcore.config import FlextronError
from flextron_mcore.layers.ends import ElasticOutputLayer
from flextron_mcore.layers.gpt import ArchitectureGPTModel
from flextron_mcore.layers.state import FULL, LayerState, StateReader, TokenRouting
from flextron_mcore.layers.transformer_layer import ElasticTransformerLayer
from flextron_mcore.layers.weighted import WeightedNetwork, mask
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.space import SubNetwork, parameter_share

Network = SubNetwork | TokenRouting | WeightedNetwork | None


def set_subnetwork(model: torch.nn.Module, net: Network, gates: Sequence[torch.Tensor] | None = None) -> None:
    """Make `model` compute `net` from now on. Raises FlextronError if `net` does not fit the model.

    Args:
        model: model with elastic layers, wrapped or not.
        net: None for the full model, a SubNetwork, a TokenRouting (a width for every token) or a WeightedNetwork (masks).
        gates: scalar that multiplies the output of each block, ordered by layer, then by axis; None for no gates.
    """
    gpt = unwrap(model)
    layers: Sequence[ElasticTransformerLayer] = gpt.decoder.layers
    if isinstance(net, SubNetwork):
        states = _sliced(gpt, net)
    elif isinstance(net, WeightedNetwork):
        states = _weighted(layers, net)
    elif net is not None:
        if _modulated(gpt):
            raise FlextronError("token routing does not support modulation: use a checkpoint without it")
        states = [LayerState(routing=net.layer(layer.layer_number - 1)) for layer in layers]
    else:
        states = [FULL] * len(layers)
    if gates:
        states = [replace(state, gates=_gates(layer, gates)) for layer, state in zip(layers, states, strict=True)]
    for layer, state in zip(layers, states, strict=True):
        layer.holder.state = state
    for end in _ends(gpt):
        end.holder.state = states[0] if states else FULL


@contextlib.contextmanager
def use_subnetwork(model: torch.nn.Module, net: Network) -> Iterator[None]:
    """Make `model` compute `net` inside the context. The previous network is restored afterwards.

    `net` is None for the full model, a SubNetwork, a TokenRouting (a width for every token) or a WeightedNetwork (masks). Raises
    FlextronError if it does not fit the model.

    >>> import torch
    >>> initialize()
    >>> arch = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=67, max_position_embeddings=24)
    >>> space = ElasticSpace.build(arch)
    >>> model, tokens = build_model(arch, space), torch.zeros(1, 24, dtype=torch.long)
    >>> with use_subnetwork(model, space.uniform(arch, heads=2, ffn_hidden_size=32)):
    ...     model(tokens, torch.arange(24)[None], None).shape
    torch.Size([1, 24, 67])
    """
    gpt = unwrap(model)
    readers = [*gpt.decoder.layers, *_ends(gpt)]
    before = [reader.state for reader in readers]
    set_subnetwork(model, net)
    try:
        yield
    finally:
        _set(readers, before)


def keep_states(decoder: torch.nn.Module, args: tuple, hidden_states: torch.Tensor) -> None:
    """Forward hook of the decoder that restores the layers' states of this forward pass during its backward pass.

    Activation recomputation runs layers again in the backward pass. By then another micro-batch may have set other states, as
    with pipeline parallelism several are in flight.

    Args:
        decoder: Megatron-Core's TransformerBlock.
        args: inputs of its forward pass; unused.
        hidden_states: its output, whose gradient marks the start of its backward pass.
    """
    if decoder.config.recompute_granularity is None or not hidden_states.requires_grad:
        return
    layers = decoder.layers
    captured = [layer.state for layer in layers]

    def restore(grad: torch.Tensor) -> None:  # runs at the start of the decoder's backward pass
        current = [layer.state for layer in layers]
        _set(layers, captured)
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _set(layers, current))

    hidden_states.register_hook(restore)


def _set(readers: Sequence[StateReader], states: Sequence[LayerState]) -> None:
    """Give each module, and all modules that share its holder, a state."""
    for reader, state in zip(readers, states, strict=True):
        reader.holder.state = state


def _ends(gpt: GPTModel) -> list[StateReader]:
    """Embeddings and final norm of this pipeline stage, which compute with as many channels as its first layer."""
    embedding = getattr(gpt, "embedding", None)
    ends = [getattr(embedding, name, None) for name in ("word_embeddings", "position_embeddings")]
    return [end for end in (*ends, gpt.decoder.final_layernorm) if isinstance(end, StateReader)]


def _sliced(gpt: GPTModel, net: SubNetwork) -> list[LayerState]:
    """State of each layer on this rank for a sub-network. Raises FlextronError if the sub-network does not fit the model."""
    full = gpt.config.hidden_size
    if len(net.layers) != gpt.config.num_layers:
        layers = gpt.config.num_layers
        raise FlextronError(f"sub-network has {len(net.layers)} layers, the model has {layers}: choose one of its own")
    if not 0 < net.hidden_size <= full:
        raise FlextronError(f"sub-network has hidden_size {net.hidden_size}, the model has {full}: choose one of its own")
    if net.hidden_size < full and gpt.post_process and not isinstance(gpt.output_layer, ElasticOutputLayer):
        raise FlextronError(
            f"hidden_size {net.hidden_size} < {full} needs elastic embeddings and output layer: build the model with "
            "flextron_mcore.build_model"
        )
    share = None
    if _modulated(gpt):
        if not isinstance(gpt, ArchitectureGPTModel):
            raise FlextronError("space.modulation needs a model that was built with flextron_mcore.build_model")
        share = parameter_share(gpt.architecture, net)
    channels = (net.hidden_size, net.hidden_size) if net.hidden_size < full else None
    states = [LayerState(net.layers[layer.layer_number - 1], channels, share=share) for layer in gpt.decoder.layers]
    if states and channels and not gpt.post_process:  # pipeline stages exchange tensors of all channels
        states[-1] = replace(states[-1], channels=(net.hidden_size, full))
    return states


def _weighted(layers: Sequence[ElasticTransformerLayer], net: WeightedNetwork) -> list[LayerState]:
    """State of each of `layers` for a network with a weight for every candidate (layers/weighted.py).

    A unit's mask is the sum of the weights of the candidates that include the unit. The output of each block of a layer is
    multiplied with the weight of executing the layer.
    """
    channels = mask(net.hidden_K, layers[0].mlp.space.hidden_size)  # one for all layers
    states = []
    for layer in layers:
        i = layer.layer_number - 1
        masks = {block.axis: block.unit_mask(net.widths_LK[block.axis][i]) for block in layer.blocks}
        gates = {block.axis: net.layers_L[i] for block in layer.blocks}
        states.append(LayerState(masks={"hidden_size": channels, **masks}, gates=gates, share=net.share))
    return states


def _gates(layer: ElasticTransformerLayer, gates: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """{axis: gate} of one layer's blocks, from the gates of all blocks of the model, ordered by layer, then by axis."""
    names = [axis.name for axis in layer_axes()]
    first = len(names) * (layer.layer_number - 1)
    return dict(zip(names, gates[first : first + len(names)], strict=True))


def _modulated(gpt: GPTModel) -> bool:
    """True if blocks of the model have learned gains (layers/block.py)."""
    return any(block.modulation is not None for layer in gpt.decoder.layers for block in layer.blocks)
