"""Export as a Hugging Face directory, which transformers, vLLM, TensorRT-LLM and SGLang load."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flextron_mcore.axes import added_tensors
from flextron_mcore.checkpoint.reader import DTYPES
from flextron_mcore.checkpoint.writer import LazyTensor
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.exports.cut import cut, cut_config, plain_norms
from flextron_mcore.exports.directory import begin, figures, load_with_own_code, write_code, write_json
from flextron_mcore.exports.formats import Format, Job, rounding
from flextron_mcore.exports.hf.deci import ARCHITECTURE as DECI
from flextron_mcore.exports.hf.deci import FFN_MULTIPLE, deci_config, deci_family, write_deci_code
from flextron_mcore.exports.hf.writer import model_card, write_weights
from flextron_mcore.exports.padding import deci_slots, widest_slots, zero_padded
from flextron_mcore.families import coded_family, family_of_model
from flextron_mcore.families.family import Family
from flextron_mcore.families.tensors import Placed, of_network
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.settings.formats import HfSettings
from flextron_mcore.space import LayerChoice, SubNetwork, count_parameters, weight_bytes

_CODE = Path(__file__).parent / "code"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write(job: Job) -> dict[str, Any]:
    """Write job.net as a dense model in a Hugging Face directory. Call on all ranks, which share the files of weights.

    With style=auto, a network that a stock class of transformers can hold is written as that class. Any other is written as a
    subclass named `Flextron...`, whose code is in the directory and needs `trust_remote_code=True`. With style=padded, it is
    written as the stock class, and with style=nemotron_nas as DeciLMForCausalLM, with zeros where these need equal widths.
    Keys of config.json that do not depend on widths keep the values of the model that was imported.

    Returns format, architecture, parameters, bytes and files; also `reason` if no stock class can hold the network, and
    `padded_parameters` with padding. Raises FlextronError for a model of no family, a network outside of the space, a style whose
    class cannot hold the model, or a job.out that is not an empty directory.
    """
    family, reason, slots = _target(job)
    return write_as(family, job, reason, slots)


def _target(job: Job) -> tuple[Family, str | None, Sequence[LayerChoice] | None]:
    """Family, reason and slots of `write_as` for the export's style. Raises FlextronError if its class cannot hold job.net."""
    style = (job.settings or HfSettings()).style
    model, layers = job.info.model, job.net.executed_layers
    if style == "nemotron_nas":
        return deci_family(model), None, deci_slots(layers, FFN_MULTIPLE)
    family = family_of_model(model, job.info.hf_config)
    if style == "padded":
        slots = widest_slots(layers)
        if refused := family.refusal(model, job.net.hidden_size, slots[0]):
            raise FlextronError(
                f"hf.style=padded: {refused}: use hf.style=auto, or a sub-network whose widest layer has other heads"
            )
        return family, None, slots
    return *_class_for(family, model, job.net), None


def write_as(
    family: Family, job: Job, reason: str | None, slots: Sequence[LayerChoice] | None = None, folded: bool = True
) -> dict[str, Any]:
    """Write job.net as a model of a given family, which `write` chooses by the style. Call on all ranks.

    Writes the files, returns the figures and raises the errors of `write`.

    Args:
        family: family that can represent the model.
        job: the export.
        reason: reason why transformers' own class cannot hold the network; the family's class in code/ is then written. None for
            transformers' own class, and for DeciLM.
        slots: widths that the executed layers are padded to with zeros; None for those of job.net.
        folded: multiply the compensation of heads into the output projection (`cut`).
    """
    info, net, out, dtype = job.info, job.net, job.out, DTYPES[job.dtype]
    own = SubNetwork(net.hidden_size, net.executed_layers)
    held = own if slots is None else replace(own, layers=tuple(slots))
    mapped = family.names.map(of_network(info.model, held, held, added_tensors()), "format=hf")
    tensors = cut(info, net, refitted=job.refitted, folded=folded)
    tensors = tensors if family.zero_centered else plain_norms(info.model, tensors)
    if slots is not None:
        tensors = _padded(tensors, of_network(info.model, own, held, added_tensors()))

    def prepared() -> dict[str, Any]:
        """Write everything but the weights and config.json; return config.json."""
        begin(job, weight_bytes(info.model, held, job.dtype))
        config = _config(job, family, reason, held) | {"torch_dtype": str(dtype).removeprefix("torch.")}
        if not (out / "generation_config.json").is_file():
            ids = {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}
            write_json(out / "generation_config.json", ids)
        if reason:
            write_code(out, _CODE, _code_files(family), family)
        elif family.architecture == DECI:
            write_deci_code(out, _CODE)
        return config

    config = on_main_process(prepared)
    parameters = write_weights(out, mapped, tensors, dtype, job.max_shard_size, job.progress)
    if parameters != count_parameters(info.model, held):
        raise AssertionError(f"{parameters} parameters written, {count_parameters(info.model, held)} counted")
    (architecture,) = config["architectures"]

    def finished() -> dict[str, Any]:
        (out / "README.md").write_text(model_card(job, architecture, parameters), encoding="utf-8")
        write_json(out / "config.json", config)
        return figures(out, "hf", architecture, count_parameters(info.model, net))

    found = on_main_process(finished) | ({"reason": reason} if reason else {})
    return found | ({} if slots is None else {"padded_parameters": parameters})


def logits(job: Job, net: SubNetwork, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] in fp32 that transformers computes from the directory. Call on the main process.

    Args:
        job: the export.
        net: network of the export; unused.
        tokens_BS: token ids.
    """
    exported = load_with_own_code(job.out)
    with torch.no_grad():
        return exported(tokens_BS).logits


FORMAT = Format(write, logits, rounding, check=_target)


def _class_for(family: Family, model: ModelConfig, net: SubNetwork) -> tuple[Family, str | None]:
    """Family to write a network as, and the reason why its stock class cannot hold it; None if it can.

    A family without code for layers of different widths leaves them to another that can represent the model. Raises FlextronError
    if no class can hold the network.
    """
    layers = net.executed_layers
    reason = "the widths differ from layer to layer" if not net.is_uniform else family.refusal(model, net.hidden_size, layers[0])
    if reason is None:
        return family, None
    coded = coded_family(model, family)
    if coded is None:
        raise FlextronError(f"format=hf: {reason}, and {family.name} has no class of its own for that: choose a uniform network")
    return coded, reason


def _code_files(family: Family) -> tuple[str, str]:
    """Names of the two files in code/ for layers of different widths, without .py: configuration and model."""
    return f"configuration_flextron_{family.model_type}", f"modeling_flextron_{family.model_type}"


def _config(job: Job, family: Family, reason: str | None, held: SubNetwork) -> dict[str, Any]:
    """Content of config.json.

    Args:
        job: the export.
        family: family to write it as.
        reason: reason why the stock class cannot hold the network, so that the class in code/ is named; None for the stock class
            and DeciLM.
        held: widths of the written layers, padding included.
    """
    info, elastic, layers = job.info, f"Flextron{family.architecture}", held.layers
    dense = replace(
        cut_config(info.model, job.net),
        num_attention_heads=max(layer.num_attention_heads for layer in layers),
        num_query_groups=max(layer.kv_groups for layer in layers),
        ffn_hidden_size=max(layer.ffn_hidden_size for layer in layers),
    )
    config = {
        "architectures": [elastic if reason else family.architecture],
        "model_type": f"flextron_{family.model_type}" if reason else family.model_type,
        **family.config(dense, info.hf_config or {}),
        **_token_ids(job),
        "use_cache": True,
    }
    if family.architecture == DECI:
        return config | deci_config(layers, held.hidden_size)
    if not reason:
        return config
    configuration, modeling = _code_files(family)
    return config | {
        "auto_map": {
            "AutoConfig": f"{configuration}.Flextron{family.classes}Config",
            "AutoModel": f"{modeling}.Flextron{family.classes}Model",
            "AutoModelForCausalLM": f"{modeling}.{elastic}",
        },
        "head_dim": info.model.kv_channels,
        "per_layer_config": {
            str(i): {theirs: getattr(layer, ours) for theirs, ours in family.widths.items()} for i, layer in enumerate(layers)
        },
        "num_attention_heads_per_layer": [layer.num_attention_heads for layer in layers],  # SGLang reads this key
    }


def _padded(tensors: Mapping[str, LazyTensor], places: Iterable[Placed]) -> dict[str, LazyTensor]:
    """Tensors that are padded with zeros when they are loaded.

    Args:
        tensors: {name: tensor} with their own sizes.
        places: for each tensor its own sizes, and as `whole` the padded ones.
    """

    def load(lazy: LazyTensor, placed: Placed) -> torch.Tensor:
        return zero_padded(lazy.load(), placed)

    return {
        placed.name: replace(
            tensors[placed.name], shape=tuple(map(math.prod, placed.whole)), load=partial(load, tensors[placed.name], placed)
        )
        for placed in places
    }


def _token_ids(job: Job) -> dict[str, Any]:
    """{key of config.json: id of a special token, or None}: of the imported config.json, if there is one, else of the tokenizer.

    Without both, null is written for every key, because transformers' defaults are ids in the vocabularies of Llama and GPT-2.
    """
    if job.info.hf_config:
        return {name: job.info.hf_config[name] for name in _TOKEN_IDS if name in job.info.hf_config}
    if job.tokenizer is None:
        return dict.fromkeys(_TOKEN_IDS)
    from flextron_mcore.data.tokenizer import open_tokenizer  # late: imports transformers, which is slow

    opened = open_tokenizer(job.tokenizer).hf
    return {name: getattr(opened, name) for name in _TOKEN_IDS}
