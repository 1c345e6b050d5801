"""Export a sub-network as a Hugging Face directory, the form that transformers, vLLM, TensorRT-LLM and SGLang load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from flextron_mcore.checkpoint.reader import DTYPES
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.exports.cut import cut, cut_config, placed_tensors, plain_norms
from flextron_mcore.exports.directory import begin, figures, write_json
from flextron_mcore.exports.formats import Format, Job, rounding
from flextron_mcore.exports.hf.writer import model_card, write_weights
from flextron_mcore.families import family_of_model
from flextron_mcore.families.family import Family
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.space import SubNetwork, count_parameters, weight_bytes

_CODE = Path(__file__).parent / "code"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write(job: Job) -> dict[str, Any]:
    """Write job.net as a dense model. Call on all ranks, which share the weights out.

    A network that a stock class of transformers can hold is written as that class, any other as its `Flextron` subclass, whose
    code goes along (`trust_remote_code=True`). Values that no cut changes come from the config that the model was imported from.
    Returns format, architecture, parameters, bytes and files (of the whole directory); `reason` if no stock class was possible.
    Raises FlextronError for a model of no family, a network outside the space, or an `out` that is not an empty directory.
    """
    info, net, out, dtype = job.info, job.net, job.out, DTYPES[job.dtype]
    family = family_of_model(info.model, info.hf_config)
    mapped = family.names.map(placed_tensors(info.model, net), "format=hf")
    tensors = plain_norms(info.model, cut(info, net))
    reason = _not_stock(family, info.model, net)

    def prepared() -> dict[str, Any]:
        """Everything but the weights and config.json, which is returned."""
        begin(job, weight_bytes(info.model, net, job.dtype))
        config = _config(job, family, reason) | {"torch_dtype": str(dtype).removeprefix("torch.")}
        if not (out / "generation_config.json").is_file():
            ids = {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}
            write_json(out / "generation_config.json", ids)
        for name in _code_files(family) if reason else ():
            shutil.copyfile(_CODE / f"{name}.py", out / f"{name}.py")
        return config

    config = on_main_process(prepared)
    parameters = write_weights(out, mapped, tensors, dtype, job.max_shard_size, job.progress)
    if parameters != count_parameters(info.model, net):
        raise AssertionError(f"{parameters} parameters written, {count_parameters(info.model, net)} counted")
    (architecture,) = config["architectures"]

    def finished() -> dict[str, Any]:
        (out / "README.md").write_text(model_card(job, architecture), encoding="utf-8")
        write_json(out / "config.json", config)
        return figures(out, "hf", architecture, parameters)

    return on_main_process(finished) | ({"reason": reason} if reason else {})


def logits(job: Job, net: SubNetwork, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits of the directory, in transformers."""
    from transformers import AutoModelForCausalLM  # slow to import

    exported = AutoModelForCausalLM.from_pretrained(job.out, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        return exported(tokens_BS).logits


FORMAT = Format(write, logits, rounding)


def _not_stock(family: Family, model: ModelConfig, net: SubNetwork) -> str | None:
    """Why the stock class cannot hold `net`; None if it can. Raises FlextronError where no other class could."""
    layers = net.executed_layers
    reason = "the widths differ from layer to layer" if not net.is_uniform else family.refusal(model, net.hidden_size, layers[0])
    if reason and family.classes is None:
        raise FlextronError(f"format=hf: {reason}, and {family.name} has no class of its own for that: choose a uniform network")
    return reason


def _code_files(family: Family) -> tuple[str, str]:
    """The files of `code/` that hold the class for layers of different widths, without `.py`: configuration and model."""
    return f"configuration_flextron_{family.model_type}", f"modeling_flextron_{family.model_type}"


def _config(job: Job, family: Family, reason: str | None) -> dict[str, Any]:
    """config.json: of the stock class, or with a `reason` against it of the class in `code/`."""
    info, elastic = job.info, f"Flextron{family.architecture}"
    config = {
        "architectures": [elastic if reason else family.architecture],
        "model_type": f"flextron_{family.model_type}" if reason else family.model_type,
        **family.config(cut_config(info.model, job.net), info.hf_config or {}),
        **_token_ids(job),
        "use_cache": True,
    }
    if not reason:
        return config
    layers = job.net.executed_layers
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
        "num_attention_heads_per_layer": [layer.num_attention_heads for layer in layers],  # where SGLang looks
    }


def _token_ids(job: Job) -> dict[str, Any]:
    """Ids of the special tokens: those the model was imported with, else the tokenizer's, else null.

    Null is said: the classes' defaults are ids of Llama's and GPT-2's own vocabularies.
    """
    if job.info.hf_config:
        return {name: job.info.hf_config[name] for name in _TOKEN_IDS if name in job.info.hf_config}
    if job.tokenizer is None:
        return dict.fromkeys(_TOKEN_IDS)
    from flextron_mcore.data.tokenizer import open_tokenizer  # imports transformers, slow

    opened = open_tokenizer(job.tokenizer).hf
    return {name: getattr(opened, name) for name in _TOKEN_IDS}
