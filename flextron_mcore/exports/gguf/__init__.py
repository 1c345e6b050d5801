"""Export as one GGUF file for llama.cpp, architecture `deci`: a Llama whose layers have different numbers of heads and neurons.

A model that normalises queries and keys is written as `qwen3`, one with Nemotron's layers as `nemotron`.

Sources: the GGUF specification, and llama.cpp's loader and graph of `deci` (src/models/deci.cpp).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.exports.cut import cut
from flextron_mcore.exports.directory import check_empty, figures
from flextron_mcore.exports.formats import Format, Job
from flextron_mcore.families import llama, nemotron
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.space import SubNetwork, count_parameters

FILE = "model.gguf"
# Largest difference of logits that a type's rounding explains, as a share of the logits' standard deviation (`_logit_scale`),
# because rounding is relative. The largest measured in 46 small random networks, where rounding averages out least: f16 0.012,
# q8_0 0.48.
_ROUNDING = {"f16": 0.04, "q8_0": 1.0}


def write(job: Job) -> dict[str, Any]:
    """Write job.net as model.gguf, and README.md. Call on all ranks; the main process writes one tensor at a time.

    Weight matrices have the type of job.settings, by default f32 in an fp32 export, else f16. Vectors are always f32. Returns
    format, architecture, parameters, bytes, files. Raises FlextronError without the package gguf, and for a model that llama.cpp
    does not compute, a tokenizer that it lacks, weights too large for f16, a network outside of the space, a job.out that is not
    an empty directory, or both a type and another dtype than the checkpoint's.
    """
    architecture, kind = _check(job)
    from flextron_mcore.exports.gguf import tokenizer, writer  # late: they import the optional package gguf

    model, file = job.info.model, job.out / FILE

    def written() -> dict[str, Any]:
        check_empty(job.out)
        vocabulary = tokenizer.read(job.tokenizer, model.vocab_size) if job.tokenizer else None
        try:
            parameters = writer.write_file(job, file, kind, architecture, vocabulary)
            (job.out / "README.md").write_text(writer.card(job, file, kind, vocabulary), encoding="utf-8")
        except BaseException:
            file.unlink(missing_ok=True)  # leave no incomplete model
            raise
        if parameters != count_parameters(model, job.net):
            raise AssertionError(f"{parameters} parameters written, {count_parameters(model, job.net)} counted")
        return figures(job.out, "gguf", architecture, parameters)

    return on_main_process(written)


def _check(job: Job) -> tuple[str, str]:
    """Architecture and type of an export. Raises FlextronError without the package, and for what llama.cpp does not compute."""
    require_library()
    return _architecture(job.info.model, job.net), _type(job)


def logits(job: Job, net: SubNetwork, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] of the file, computed in fp32 as llama.cpp does. Call on the main process.

    Raises FlextronError without the package gguf, and for a damaged file.

    Args:
        job: the export.
        net: network of the export; unused.
        tokens_BS: token ids.
    """
    require_library()
    from flextron_mcore.exports.gguf.forward import forward  # late: imports the optional package gguf

    return forward(job.out / FILE, tokens_BS)


def tolerance(job: Job) -> float:
    """Largest absolute difference between logits of the export and of the checkpoint that rounding explains.

    Sums in fp32 are rounded, and for types other than f32 the weights, too. Both parts grow with the estimated standard deviation
    of the logits (_ROUNDING).
    """
    scale, kind = _logit_scale(job), _type(job)
    return 1e-4 * max(1.0, scale) + _ROUNDING.get(kind, 0.0) * scale


FORMAT = Format(write, logits, tolerance, check=_check)


def require_library() -> None:
    """Raise FlextronError if the package gguf is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise FlextronError("format=gguf needs the Python package gguf: pip install 'flextron_mcore[gguf]'") from None


def _architecture(model: ModelConfig, net: SubNetwork) -> str:
    """llama.cpp's architecture for a network: deci, or qwen3 or nemotron, whose layers all have the same widths.

    Raises FlextronError for a model or network that llama.cpp computes in none of them.
    """
    scaling = dict(model.rope_scaling or {})
    if not scaling.get("truncate", True):
        raise FlextronError(
            'format=gguf: llama.cpp has no YaRN with "truncate": false in rope_scaling, as this model has: use format=hf'
        )
    name = "qwen3" if model.qk_layernorm else "deci" if nemotron.FAMILY.misfits(model) else "nemotron"
    heads = model.kv_channels * max(layer.num_attention_heads for layer in net.executed_layers)
    faults = {
        "layers of different widths": not net.is_uniform,
        "biases": name == "qwen3" and model.qkv_bias,
        "heads that do not fill the hidden size": name == "nemotron" and heads != net.hidden_size,
        "tied embeddings": name == "nemotron" and model.share_embeddings_and_output_weights,
        "rotary frequencies of Llama 3": scaling.get("type") == "llama3",
        "rotary frequencies of longrope": scaling.get("type") == "longrope",
    }
    if name != "deci" and any(faults.values()):
        missing = next(fault for fault, found in faults.items() if found)
        raise FlextronError(f"format=gguf: llama.cpp's {name} has no {missing}, which this network needs: use format=hf")
    if name == "nemotron":
        return name
    unseen = (model.sliding_window or 0) >= model.max_position_embeddings  # no text is longer than the window
    window = {"sliding_window": None, "window_attn_skip_freq": None} if unseen else {}
    plain = replace(model, add_qkv_bias=False, qk_layernorm=False, **window)
    if misfits := llama.FAMILY.misfits(plain):
        raise FlextronError(
            f"format=gguf: the file holds layers as Llama has them, each with its own widths, which needs {', '.join(misfits)}: "
            "use format=hf"
        )
    return name


def _type(job: Job) -> str:
    """GGUF type of the weight matrices: gguf.type, by default f32 in an fp32 export, else f16.

    Raises FlextronError if gguf.type is set and the export's dtype is not the checkpoint's.
    """
    kind = job.settings.type if job.settings else None
    if kind is None:
        return "f32" if job.dtype == "fp32" else "f16"
    if job.dtype != job.info.dtype:
        raise FlextronError(f"dtype={job.dtype} and gguf.type={kind} both set how weights are stored: give only one of them")
    return kind


def _logit_scale(job: Job) -> float:
    """Estimated standard deviation of logits: norm over channels of the final norm's scale times the output layer's columns."""
    tensors = cut(job.info, job.net, refitted=job.refitted)
    rows = tensors.get("output_layer.weight") or tensors["embedding.word_embeddings.weight"]
    gain_C = tensors["decoder.final_layernorm.weight"].load().float()
    channel_C = torch.linalg.vector_norm(rows.load(), dim=0, dtype=torch.float32) / math.sqrt(job.info.model.vocab_size)
    return torch.linalg.vector_norm(gain_C * channel_C).item()
