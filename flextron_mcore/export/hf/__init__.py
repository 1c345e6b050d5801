"""Export a sub-network as a Hugging Face directory, the form that transformers, vLLM, TensorRT-LLM and SGLang load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from flextron_mcore.checkpoint.reader import DTYPES
from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.export.cut import cut, cut_config, executed_layers
from flextron_mcore.export.formats import Format, Job, rounding
from flextron_mcore.export.hf import gpt2, llama
from flextron_mcore.export.hf.target import Target
from flextron_mcore.export.hf.writer import model_card, write_json, write_weights
from flextron_mcore.export.tokenizer import take_tokenizer
from flextron_mcore.runtime.disk import check_space
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.space import SubNetwork, count_parameters, weight_bytes

TARGETS = (llama.TARGET, gpt2.TARGET)
_CODE = Path(__file__).parent / "code"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write(job: Job) -> dict[str, Any]:
    """Write job.net as a dense model. Call on all ranks, which share the weights out.

    A network that a stock class of transformers can hold is written as that class, any other as its `Flextron` subclass, whose
    code goes along (`trust_remote_code=True`). Values that no cut changes come from the config that the model was imported from.
    Returns format, architecture, parameters, bytes and files (of the whole directory); `reason` if no stock class was possible.
    Raises FlextronError for a model of no family, a network outside the space, or an `out` that is not an empty directory.
    """
    info, net, out, dtype, tokenizer = job.info, job.net, job.out, job.dtype, job.tokenizer
    model = info.model
    target = _target(model)
    tensors = cut(info, net)
    layers, reason = executed_layers(net), target.not_stock(model, net)

    def prepared() -> dict[str, Any]:
        """Everything but the weights and config.json, which is returned."""
        if not out.is_dir() or any(out.iterdir()):
            raise FlextronError(f"out={out}: not an empty directory")
        check_space(out, weight_bytes(model, net, dtype))
        config = _config(info, net, target, reason, tokenizer) | {"torch_dtype": str(DTYPES[dtype]).removeprefix("torch.")}
        if tokenizer:
            take_tokenizer(tokenizer, out)
        if not (out / "generation_config.json").is_file():
            ids = {name: config[name] for name in _TOKEN_IDS if config.get(name) is not None}
            write_json(out / "generation_config.json", ids)
        for name in target.code_files if reason else ():
            shutil.copyfile(_CODE / f"{name}.py", out / f"{name}.py")
        return config

    config = on_main_process(prepared)
    parts = list(target.parts(model, layers, net.hidden_size))
    parameters = write_weights(out, parts, tensors, DTYPES[dtype], job.max_shard_size, job.progress)
    if parameters != count_parameters(model, net):
        raise AssertionError(f"{parameters} parameters written, {count_parameters(model, net)} counted")
    (architecture,) = config["architectures"]

    def finished() -> list[int]:
        """Bytes of each file."""
        (out / "README.md").write_text(model_card(job, architecture), encoding="utf-8")
        write_json(out / "config.json", config)
        return [file.stat().st_size for file in out.iterdir()]

    sizes = on_main_process(finished)
    result = {
        "format": "hf",
        "architecture": architecture,
        "parameters": parameters,
        "bytes": sum(sizes),
        "files": len(sizes),
    }
    return result | ({"reason": reason} if reason else {})


def logits(job: Job, net: SubNetwork, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Of the directory, in transformers."""
    from transformers import AutoModelForCausalLM

    exported = AutoModelForCausalLM.from_pretrained(job.out, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        return exported(tokens_BS).logits


FORMAT = Format(write, logits, rounding)


def _target(model: ModelConfig) -> Target:
    """The family that can represent `model`."""
    complaints = []
    for target in TARGETS:
        misfits = target.misfits(model)
        if not misfits:
            return target
        complaints.append((len(misfits), f"{target.name} needs {', '.join(misfits)}"))
    nearest_first = "; ".join(text for _, text in sorted(complaints))
    raise FlextronError(f"format=hf: this model is of no family that it can write: {nearest_first}")


def _config(info: CheckpointInfo, net: SubNetwork, target: Target, reason: str | None, tokenizer: Path | None) -> dict[str, Any]:
    """config.json: of the stock class, or with a `reason` against it of the class in `code/`."""
    config = {
        "architectures": [target.elastic if reason else target.stock],
        "model_type": f"flextron_{target.model_type}" if reason else target.model_type,
        **target.config(cut_config(info.model, net), info.hf_config or {}),
        **_token_ids(info, tokenizer),
        "use_cache": True,
    }
    if not reason:
        return config
    layers = executed_layers(net)
    configuration, modeling = target.code_files
    return config | {
        "auto_map": {
            "AutoConfig": f"{configuration}.Flextron{target.classes}Config",
            "AutoModel": f"{modeling}.Flextron{target.classes}Model",
            "AutoModelForCausalLM": f"{modeling}.{target.elastic}",
        },
        "head_dim": info.model.kv_channels,
        "per_layer_config": {str(i): target.widths(layer) for i, layer in enumerate(layers)},
        "num_attention_heads_per_layer": [layer.num_attention_heads for layer in layers],  # where SGLang looks
    }


def _token_ids(info: CheckpointInfo, tokenizer: Path | None) -> dict[str, Any]:
    """Ids of the special tokens: those the model was imported with, else the tokenizer's, else null.

    Null is said: the classes' defaults are ids of Llama's and GPT-2's own vocabularies.
    """
    if info.hf_config:
        return {name: info.hf_config[name] for name in _TOKEN_IDS if name in info.hf_config}
    if tokenizer is None:
        return dict.fromkeys(_TOKEN_IDS)
    from flextron_mcore.data.tokenizer import open_tokenizer

    opened = open_tokenizer(tokenizer).hf
    return {name: getattr(opened, name) for name in _TOKEN_IDS}
