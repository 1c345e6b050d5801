"""Comparison of an imported checkpoint with transformers, which reads the original directory by itself.

Shape suffixes: B batch, S sequence, C hidden channels.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import safe_open
from torch.nn import functional as F

from flextron_mcore.checkpoint.reader import DTYPES
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError
from flextron_mcore.model import loaded_model
from flextron_mcore.pipeline.logits import forward_logits
from flextron_mcore.runtime.unwrap import unwrap
from flextron_mcore.settings.sections import LayoutSettings
from flextron_mcore.space import weight_bytes

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_TOLERANCE = 1e-4  # share of the largest value: fp32 rounds differently in another order of summation
_LENGTH = 64  # tokens of a sample
_SHORTEST = 2  # tokens; least original context of LongRoPE that transformers computes
_USABLE = 0.6  # share of the free memory that models may take


def compare_with_transformers(info: CheckpointInfo, source: Path, seed: int = 0, layerwise: bool | None = None) -> dict[str, Any]:
    """Compare a checkpoint with the Hugging Face directory that it was imported from, in fp32 on random tokens.

    Call after `initialize`, on a single rank. A model with LongRoPE is compared with its short factors, and then with its long
    ones, with an original context of two tokens on both sides, so that as few tokens suffice.

    Args:
        info: checkpoint.
        source: Hugging Face directory, which transformers reads without running code in it.
        seed: seed of the random tokens.
        layerwise: True: compare layer by layer. Each layer of transformers gets the input that Megatron-Core's layer got, and one
            of them is in memory at a time. False: compare logits of whole models. None: True if both models do not fit in memory.

    Returns:
        {"max_logit_difference": largest difference of the logits}, and if layerwise {"max_layer_difference": largest difference
        of a layer's output or of the embeddings}. Each is a share of the largest value of transformers, if that is above 1.

    Raises:
        FlextronError: a difference is larger than rounding explains, transformers cannot load the directory, or memory is too
            small.
    """
    size, free = weight_bytes(info.model, dtype="fp32"), psutil.virtual_memory().available * _USABLE
    if size > free:
        raise FlextronError(
            f"verify=true: needs {size / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} GiB can be used: leave verify=true out"
        )
    from transformers import AutoConfig  # late: slow to import

    length = min(info.model.max_position_embeddings, _LENGTH)
    with _refusals(source):
        rows = AutoConfig.from_pretrained(source).vocab_size  # fewer than the checkpoint's, if it was resized
    short = info.model.short_context
    worst: dict[str, Any] = {}
    for long in (False,) if short is None or short >= info.model.max_position_embeddings else (False, True):
        shape = 2, length if long or short is None else min(length, short)
        tokens_BS = torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(seed))
        chunks = loaded_model(LayoutSettings(), info, "fp32")
        if long:
            unwrap(chunks[0]).rotary_pos_emb.original = _SHORTEST
        with _recorded(unwrap(chunks[0])) as states:
            ours = forward_logits(chunks, None, tokens_BS).cpu()[..., :rows]
        del chunks
        with _refusals(source):
            if not (2 * size > free if layerwise is None else layerwise):
                theirs = _load(source, info.dtype)
                _check_switch(theirs, short, source)
                found = {"max_logit_difference": _close(ours, _sided(theirs, long)(tokens_BS).logits, source, "logits")}
            else:
                found = _by_layer(info, source, tokens_BS, states, ours, long)
        worst = {name: max(value, worst.get(name, 0.0)) for name, value in found.items()}
    return worst


def _sided(model: torch.nn.Module, long: bool) -> torch.nn.Module:
    """Return a transformers model, set to LongRoPE's long factors for sequences of more than _SHORTEST tokens if `long`."""
    if long:
        _scaling(model)["original_max_position_embeddings"] = model.config.original_max_position_embeddings = _SHORTEST
    return model


def _scaling(model: torch.nn.Module) -> dict[str, Any]:
    """Rotary parameters of a transformers model: rope_scaling in transformers 4, rope_parameters in 5."""
    return getattr(model.config, "rope_parameters", None) or model.config.rope_scaling


def _check_switch(model: torch.nn.Module, short: int | None, source: Path) -> None:
    """Raise FlextronError unless a transformers model has the long factors for sequences of more than `short` tokens.

    short: tokens of the longest sequence with the short factors; None for a model without LongRoPE.
    """
    if short is None:
        return
    outside = getattr(model.config, "original_max_position_embeddings", None)  # comes first in transformers
    theirs = outside or _scaling(model)["original_max_position_embeddings"]
    if theirs != short:
        raise FlextronError(
            f"import: original_max_position_embeddings of the imported model is {short}, and transformers reads {theirs} from "
            f"{source}: do not use this import; please report it"
        )


def _by_layer(
    info: CheckpointInfo, source: Path, tokens_BS: torch.Tensor, states: list[torch.Tensor], ours: torch.Tensor, long: bool
) -> dict[str, Any]:
    """Compare embeddings, each layer, and final norm with output layer, with one layer of transformers in memory at a time.

    Returns {"max_logit_difference", "max_layer_difference"}, each a share of the largest value of transformers if that is above
    1. Raises FlextronError if one is more than _TOLERANCE.

    Args:
        info: checkpoint.
        source: Hugging Face directory.
        tokens_BS: token ids.
        states: Megatron-Core's inputs of the layers and output of the last one, [B, S, C] each.
        ours: Megatron-Core's logits [B, S, vocabulary].
        long: compute with the long factors of LongRoPE.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    config.tie_word_embeddings = info.model.share_embeddings_and_output_weights
    dtype, worst = DTYPES[info.dtype], 0.0
    ends = AutoModelForCausalLM.from_config(_one_layer(config, 0), dtype=torch.float32).eval()
    _check_switch(ends, info.model.short_context, source)
    _fill(ends, source, 0, dtype, ends=True)
    with _recorded_layer(ends.base_model) as seen:
        ends(tokens_BS)
    worst = max(worst, _close(states[0], seen["input"], source, "embeddings"))
    base = ends.base_model
    norm, head = getattr(base, "norm", None) or base.ln_f, ends.get_output_embeddings()
    found = {"max_logit_difference": _close(ours, F.linear(norm(states[-1]), head.weight), source, "output layer")}
    del ends, base, norm, head
    for i in range(info.model.num_layers):
        small = _one_layer(config, i)
        small.vocab_size, small.pad_token_id = 1, None
        layer = _sided(AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval(), long).base_model
        _fill(layer, source, i, dtype, ends=False)
        with _recorded_layer(layer) as seen:
            layer(inputs_embeds=states[i])
        worst = max(worst, _close(states[i + 1], seen["output"], source, f"layer {i}"))
    return {**found, "max_layer_difference": worst}


def _close(ours: torch.Tensor, theirs: torch.Tensor, source: Path, what: str) -> float:
    """Largest difference between two tensors, as a share of the largest value of `theirs` if that is above 1.

    Raises FlextronError naming `source` and `what` if it is more than _TOLERANCE.
    """
    scale = max(1.0, theirs.abs().max().item())
    found = (ours - theirs).abs().max().item() / scale
    if not found <= _TOLERANCE:
        raise FlextronError(
            f"import: {what} of the imported model differ by {found:.2e} from what transformers computes from {source}, at most "
            f"{_TOLERANCE:.0e} is expected: do not use this import; please report it"
        )
    return found


def _load(source: Path, dtype: str) -> torch.nn.Module:
    """Load a directory's model in transformers, with weights rounded to `dtype` and computing in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype], local_files_only=True, trust_remote_code=False)
    return model.float().eval()


@contextlib.contextmanager
def _refusals(source: Path) -> Iterator[None]:
    """Context without gradients that turns an error of transformers into a FlextronError naming `source`."""
    with torch.no_grad():
        try:
            yield
        except FlextronError:
            raise
        except Exception as error:  # errors of many types
            reason = " ".join(str(error).split())[:200]
            raise FlextronError(f"verify=true: transformers cannot load {source}: {reason}: leave verify=true out") from error


@contextlib.contextmanager
def _recorded(gpt: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Context with a list that a forward pass of a GPTModel fills: input of every layer, then output of the last one.

    At the end of the context they are converted to [B, S, C] in fp32 on the CPU.
    """
    states: list[torch.Tensor] = []

    def before(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    layers = gpt.decoder.layers
    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    hooks.append(layers[-1].register_forward_hook(after))
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()
        states[:] = [state.detach().transpose(0, 1).float().cpu() for state in states]


@contextlib.contextmanager
def _recorded_layer(base: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Context with a dictionary that a forward pass fills: "input" and "output" [B, S, C] of the first layer of `base`.

    base: transformers model without its output layer.
    """
    seen: dict[str, torch.Tensor] = {}
    layer = (base.layers if hasattr(base, "layers") else base.h)[0]

    def after(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen["input"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        seen["output"] = output[0] if isinstance(output, tuple) else output

    hook = layer.register_forward_hook(after, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def _one_layer(config: PretrainedConfig, number: int) -> PretrainedConfig:
    """Copy of a configuration, for a model that has layer `number` only. Lists with an entry for each layer keep this one's."""
    small, layers = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers and name != "architectures":
            setattr(small, name, [value[number]])
    small.num_hidden_layers = 1
    return small


def _fill(model: torch.nn.Module, source: Path, number: int, dtype: torch.dtype, ends: bool) -> None:
    """Copy one layer's weights from a Hugging Face directory, rounded to `dtype`, into a transformers model with one layer.

    Position embeddings that get no weights are set to zero: the layer's recorded input contains them already.

    Args:
        model: model with or without its output layer.
        source: Hugging Face directory.
        number: index of the layer to copy.
        dtype: dtype of the checkpoint.
        ends: True: copy embeddings, final norm and output layer, too.
    """
    wanted = dict(model.named_parameters())
    if ends:
        wanted["lm_head.weight"] = model.get_output_embeddings().weight  # named_parameters leaves out a tied weight
    prefixes = ("", f"{model.base_model_prefix}.")
    filled = set()
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (no mapping)
                inside = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name)
                if inside and int(inside[1]) != number or not inside and not ends:
                    continue
                new = re.sub(r"((?:^|\.)(?:layers|h)\.)\d+\.", r"\g<1>0.", name)
                bare = new.removeprefix(prefixes[1])
                target = next((key for key in (new, prefixes[1] + new, bare) if key in wanted), None)
                if target:
                    wanted[target].copy_(weights.get_tensor(name).to(dtype))
                    filled.add(target)
    for name, parameter in wanted.items():
        if name not in filled and "wpe" in name:
            parameter.zero_()
