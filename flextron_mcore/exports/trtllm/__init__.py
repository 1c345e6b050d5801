"""Export as a checkpoint for TensorRT-LLM releases that build engines (up to 1.2): config.json and rank{N}.safetensors.

Releases with the PyTorch backend (1.0 and newer) load the `hf` export with the package in `runtime/` (docs/tensorrt_llm.md).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from flextron_mcore.checkpoint.reader import DTYPES
from flextron_mcore.exports.card import describe
from flextron_mcore.exports.cut import cut, plain_norms
from flextron_mcore.exports.directory import begin, figures, write_json
from flextron_mcore.exports.formats import Format, Job, rounding
from flextron_mcore.exports.trtllm.pieces import stage_pieces, write_ranks
from flextron_mcore.exports.trtllm.plan import APPROXIMATED, Plan, config, make_plan
from flextron_mcore.exports.trtllm.readback import checkpoint_logits
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.settings.formats import TrtllmSettings
from flextron_mcore.space import SubNetwork

_NOTE = "TensorRT-LLM computes GELU by its tanh approximation, the model was trained with exact GELU: logits differ slightly"


def write(job: Job) -> dict[str, Any]:
    """Write job.net as a TensorRT-LLM checkpoint. Call on all ranks, which share the files of TensorRT-LLM's ranks.

    Returns format, architecture, parameters (of the sub-network), padded_parameters (of the engine, with zeros, and with a tied
    output layer counted on its own), bytes, files; also `note` if the engine computes a slightly different function. Raises
    FlextronError for a model that TensorRT-LLM's classes cannot hold, a tensor-parallel size that does not divide a layer, more
    pipeline stages than layers, a network outside of the space, or a job.out that is not an empty directory.
    """
    info, out = job.info, job.out
    tensors = plain_norms(info.model, cut(info, job.net, refitted=job.refitted))
    plan = _plan(job)
    parameters = sum(math.prod(tensor.shape) for tensor in tensors.values())
    padded = _elements(replace(plan, tp=1, pp=1), 0)
    stored = plan.tp * sum(_elements(plan, stage) for stage in range(plan.pp))
    note = _NOTE if info.model.activation in APPROXIMATED else None
    on_main_process(lambda: begin(job, stored * DTYPES[job.dtype].itemsize, "tokenizer"))
    write_ranks(out, plan, tensors, DTYPES[job.dtype], job.progress)

    def finished() -> dict[str, Any]:
        write_json(out / "config.json", config(plan, job.dtype))
        (out / "README.md").write_text(_card(job, plan, padded, note), encoding="utf-8")
        return figures(out, "trtllm", plan.architecture, parameters) | {"padded_parameters": padded}

    return on_main_process(finished) | ({"note": note} if note else {})


def _plan(job: Job) -> Plan:
    """Plan of an export. Raises FlextronError for a model or a network that TensorRT-LLM cannot hold in this layout."""
    return make_plan(job.info.model, job.net, job.settings or TrtllmSettings())


def logits(job: Job, net: SubNetwork, tokens_BS: torch.Tensor) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] in fp32, computed from the files alone, because TensorRT-LLM needs a GPU.

    Call on the main process.

    Args:
        job: the export.
        net: network of the export; unused.
        tokens_BS: token ids.
    """
    return checkpoint_logits(job.out, tokens_BS)


def _tolerance(job: Job) -> float:
    """Largest absolute difference of logits that rounding, or an activation that TensorRT-LLM approximates, explains."""
    return max(rounding(job), 0.05) if job.info.model.activation in APPROXIMATED else rounding(job)


FORMAT = Format(write, logits, _tolerance, check=_plan)


def _elements(plan: Plan, stage: int) -> int:
    """Number of elements in the file of one rank of a pipeline stage."""
    return sum(math.prod(shape) for piece in stage_pieces(plan, stage) for shape in piece.shapes.values())


def _card(job: Job, plan: Plan, padded: int, note: str | None) -> str:
    """Text of the exported directory's README.md.

    Args:
        job: the export.
        plan: layout of the checkpoint.
        padded: number of parameters that TensorRT-LLM's engine computes with, the zeros of padding included.
        note: how the engine's results differ from this model's; None if they do not.
    """
    held = "\n".join(
        f"| {i} | {slot.num_attention_heads} | {slot.kv_groups} | {slot.ffn_hidden_size} |" for i, slot in enumerate(plan.slots)
    )
    world = plan.tp * plan.pp
    return f"""# A Flextron sub-network for TensorRT-LLM (releases that build engines, up to 1.2)

`{plan.architecture}` in {job.dtype} for {world} GPU{"s" if world > 1 else ""}: tensor parallel {plan.tp}, pipeline parallel \
{plan.pp}.{f" {note}." if note else ""}

{describe(job)}

Layers that are narrower than the class allows are padded with zeros, which do not change results. The engine computes with
{padded:,} parameters, zeros included:

| layer | query heads | key-value heads | FFN width |
|---|---|---|---|
{held}

```bash
trtllm-build --checkpoint_dir PATH --output_dir ENGINE
trtllm-serve ENGINE --backend tensorrt --tokenizer {"PATH/tokenizer" if job.tokenizer else "TOKENIZER"}
```

This export has not been run on an engine. See docs/tensorrt_llm.md of flextron_mcore.
"""
