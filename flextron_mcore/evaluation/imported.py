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

_TOLERANCE = 1e-4  # of the largest value: rounding of fp32 in other orders of summation
_LENGTH = 64
_USABLE = 0.6  # share of the free memory


def compare_with_transformers(info: CheckpointInfo, source: Path, seed: int = 0, layerwise: bool | None = None) -> dict[str, Any]:
    """Compare a checkpoint with the Hugging Face directory that it was imported from, in fp32. Call after `initialize`.

    Args:
        info: checkpoint.
        source: directory that it was imported from. transformers reads it, without code from it.
        seed: seed of the random tokens.
        layerwise: compare each layer alone, given Megatron-Core's input of it, with one of transformers' layers in memory; None:
            if both models do not fit into memory.

    Returns:
        {max_logit_difference, and with layerwise max_layer_difference, of the largest value of a layer's output}.

    Raises:
        FlextronError: the two differ by more than rounding, or transformers cannot load the directory, or memory is too small.
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
    tokens_BS = torch.randint(0, rows, (2, length), generator=torch.Generator().manual_seed(seed))
    chunks = loaded_model(LayoutSettings(), info, "fp32")
    with _recorded(unwrap(chunks[0])) as states:
        ours = forward_logits(chunks, None, tokens_BS).cpu()[..., :rows]
    del chunks
    with _refusals(source):
        if not (2 * size > free if layerwise is None else layerwise):
            theirs = _load(source, info.dtype)(tokens_BS).logits
            return {"max_logit_difference": _close(ours, theirs, source, "logits")}
        return _by_layer(info, source, tokens_BS, states, ours)


def _by_layer(
    info: CheckpointInfo, source: Path, tokens_BS: torch.Tensor, states: list[torch.Tensor], ours: torch.Tensor
) -> dict[str, Any]:
    """Figures of the comparison of each layer, and of embeddings, final norm and output layer.

    Args:
        info: checkpoint.
        source: Hugging Face directory.
        tokens_BS: token ids.
        states: inputs of the layers and output of the last one, [B, S, C] each.
        ours: logits.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    config.tie_word_embeddings = info.model.share_embeddings_and_output_weights
    dtype, worst = DTYPES[info.dtype], 0.0
    ends = AutoModelForCausalLM.from_config(_one_layer(config, 0), dtype=torch.float32).eval()
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
        layer = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval().base_model
        _fill(layer, source, i, dtype, ends=False)
        with _recorded_layer(layer) as seen:
            layer(inputs_embeds=states[i])
        worst = max(worst, _close(states[i + 1], seen["output"], source, f"layer {i}"))
    return {**found, "max_layer_difference": worst}


def _close(ours: torch.Tensor, theirs: torch.Tensor, source: Path, what: str) -> float:
    """Largest difference, as a share of the largest value where that is above 1. Raises FlextronError if it is no rounding."""
    scale = max(1.0, theirs.abs().max().item())
    found = (ours - theirs).abs().max().item() / scale
    if not found <= _TOLERANCE:
        raise FlextronError(
            f"import: {what} of the imported model differ by {found:.2e} from what transformers computes from {source}, at most "
            f"{_TOLERANCE:.0e} is expected: do not use this import; please report it"
        )
    return found


def _load(source: Path, dtype: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype], local_files_only=True, trust_remote_code=False)
    return model.float().eval()


@contextlib.contextmanager
def _refusals(source: Path) -> Iterator[None]:
    """Turn an error of transformers into a FlextronError."""
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
    """List that gets the input of every layer of a GPTModel and the output of the last one, [B, S, C], in a forward pass."""
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
    """{input, output} of the only layer of a transformers model without its head, in a forward pass."""
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
    """Configuration of a model with one layer, the one of this number. Lists with an entry for each layer get one entry."""
    small, layers = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == layers and name != "architectures":
            setattr(small, name, [value[number]])
    small.num_hidden_layers = 1
    return small


def _fill(model: torch.nn.Module, source: Path, number: int, dtype: torch.dtype, ends: bool) -> None:
    """Copy weights of the directory into a transformers model with one layer, rounded to `dtype`; positions get zeros.

    Args:
        model: model with or without its head.
        source: Hugging Face directory.
        number: layer to take.
        dtype: dtype of the checkpoint.
        ends: take embeddings, final norm and output layer too.
    """
    wanted = dict(model.named_parameters())
    if ends:
        wanted["lm_head.weight"] = model.get_output_embeddings().weight  # named_parameters leaves out a tied one
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
