"""Sections of `flextron export` for single formats: `hf`, `trtllm`, `gguf`, `hf_elastic`. No torch import."""

from __future__ import annotations

from dataclasses import dataclass

from flextron_mcore.settings.schema import path, section, setting
from flextron_mcore.settings.sections import SELECTORS, CacheSettings


@dataclass
class HfSettings:
    """Section `hf` of an export: a Hugging Face directory with one sub-network."""

    style: str = setting(
        "auto",
        "class of the written model, auto: the stock class, or for different widths in each layer one with its code in the "
        "directory; padded: the stock class, every layer zero-padded to the widest; nemotron_nas: DeciLMForCausalLM, which "
        "engines know, query heads zero-padded to the widest layer's, neurons to a multiple of 256",
        choices=("auto", "padded", "nemotron_nas"),
        only="format=hf",
    )


@dataclass
class TrtllmSettings:
    """Section `trtllm` of an export: a checkpoint for TensorRT-LLM releases that build engines (up to 1.2)."""

    style: str = setting(
        "padded",
        "padded: every layer is zero-padded to the widest layer; deci: each layer keeps its own sizes (RMSNorm, no biases)",
        choices=("padded", "deci"),
        only="format=trtllm",
    )
    tensor_parallel_size: int = setting(1, "tensor-parallel ranks of the engine", at_least=1, only="format=trtllm")
    pipeline_parallel_size: int = setting(1, "pipeline-parallel ranks of the engine", at_least=1, only="format=trtllm")


@dataclass
class GgufSettings:
    """Section `gguf` of an export: a GGUF file for llama.cpp."""

    type: str | None = setting(
        None,
        "GGUF type of the weight matrices; null: f32 if dtype is fp32, else f16",
        choices=("f32", "f16", "q8_0"),
        only="format=gguf",
    )


@dataclass
class HfElasticSettings:
    """Section `hf_elastic` of an export: one transformers directory from which any sub-network is chosen at run time."""

    networks: list[str] = path(
        [], "JSON files of more sub-networks that may be chosen for a budget, besides the selector's", only="format=hf_elastic"
    )
    selector: str = setting(
        "${selector}",
        "selector that chooses the networks for budgets; uniform if the checkpoint has no routers",
        choices=SELECTORS,
    )
    latency: str | None = path("${latency}", "latency table (the out of `flextron latency`)")
    kv_cache: CacheSettings = section(CacheSettings, batch_size="${kv_cache.batch_size}", length="${kv_cache.length}")
