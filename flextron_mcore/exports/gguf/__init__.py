"""Export as one GGUF file for llama.cpp, architecture `deci`: a Llama whose layers differ in heads and FFN width.

Source: the GGUF specification, and llama.cpp's loader and graph of `deci` (src/models/deci.cpp).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from flextron_mcore.config import FlextronError
from flextron_mcore.exports.cut import cut
from flextron_mcore.exports.directory import check_empty, figures
from flextron_mcore.exports.formats import Format, Job
from flextron_mcore.families import llama
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.space import SubNetwork, count_parameters

FILE = "model.gguf"
# Largest difference of logits that a type's rounding explains, in units of the logits' own size (`_logit_scale`): rounding is
# relative, so it grows with them. The most in 46 small random networks, whose rounding averages out least: f16 0.012, q8_0 0.48.
_ROUNDING = {"f16": 0.04, "q8_0": 1.0}


def write(job: Job) -> dict[str, Any]:
    """Write job.net as model.gguf, with a README.md. Call on all ranks; the main process writes, a tensor at a time.

    Weight matrices are f32 in an fp32 export, else f16, unless job.settings say otherwise. Vectors are always f32.
    Returns format, architecture, parameters, bytes, files.
    Raises FlextronError for a model that is no Llama, a tokenizer that llama.cpp lacks, weights too large for f16, a network
    outside the space, or an `out` that is not an empty directory.
    """
    require_library()
    from flextron_mcore.exports.gguf import tokenizer, writer  # import the package gguf, which is optional

    model, kind = job.info.model, _type(job)
    if misfits := llama.FAMILY.misfits(model):
        raise FlextronError(
            f"format=gguf: llama.cpp holds layers of different widths for Llama only, which needs {', '.join(misfits)}: "
            "use format=hf or format=trtllm"
        )
    job.info.space.check(model, job.net)

    file = job.out / FILE

    def written() -> dict[str, Any]:
        check_empty(job.out)
        vocabulary = tokenizer.read(job.tokenizer, model.vocab_size) if job.tokenizer else None
        try:
            parameters = writer.write_file(job, file, kind, vocabulary)
            (job.out / "README.md").write_text(writer.card(job, file, kind, vocabulary), encoding="utf-8")
        except BaseException:
            file.unlink(missing_ok=True)  # never half a model
            raise
        if parameters != count_parameters(model, job.net):
            raise AssertionError(f"{parameters} parameters written, {count_parameters(model, job.net)} counted")
        return figures(job.out, "gguf", "deci", parameters)

    return on_main_process(written)


def logits(job: Job, net: SubNetwork, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits of the file, computed here as llama.cpp does in fp32."""
    require_library()
    from flextron_mcore.exports.gguf.forward import forward  # imports the package gguf, which is optional

    return forward(job.out / FILE, tokens_BS)


def tolerance(job: Job) -> float:
    """Rounding of the sums, and for other types than f32 that of the weights, which grows with the logits."""
    scale, kind = _logit_scale(job), _type(job)
    return 1e-4 * max(1.0, scale) + _ROUNDING.get(kind, 0.0) * scale


FORMAT = Format(write, logits, tolerance)


def require_library() -> None:
    """Raises FlextronError where the package gguf is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise FlextronError("format=gguf needs the Python package gguf: pip install 'flextron_mcore[gguf]'") from None


def _type(job: Job) -> str:
    kind = job.settings.type if job.settings else None
    if kind is None:
        return "f32" if job.dtype == "fp32" else "f16"
    if job.dtype != job.info.dtype:
        raise FlextronError(f"dtype={job.dtype} and gguf.type={kind} are two ways to say how weights are stored: give one")
    return kind


def _logit_scale(job: Job) -> float:
    """Standard deviation that logits have: the final norm's scale times a row of the output layer, summed over channels."""
    tensors = cut(job.info, job.net)
    rows = tensors.get("output_layer.weight") or tensors["embedding.word_embeddings.weight"]
    gain_C = tensors["decoder.final_layernorm.weight"].load().float()
    channel_C = torch.linalg.vector_norm(rows.load(), dim=0, dtype=torch.float32) / math.sqrt(job.info.model.vocab_size)
    return torch.linalg.vector_norm(gain_C * channel_C).item()
