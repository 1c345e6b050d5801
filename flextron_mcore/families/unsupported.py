"""Popular architectures that the elastic model does not support, with the reason for the message. No torch import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# {feature that the elastic model does not support: prefixes of transformers' class names}
_LACKING = {
    "experts (MoE)": (
        *(
            "Mixtral",
            "Qwen2Moe",
            "Qwen3Moe",
            "Qwen3Next",
            "Deepseek",
            "GptOss",
            "Llama4",
            "Phimoe",
            "PhiMoE",
            "Olmoe",
            "GraniteMoe",
        ),
        *("Glm4Moe", "Dbrx", "Jamba"),
    ),
    "norms after its blocks, or soft caps on logits": ("Gemma2", "Gemma3", "Gemma4", "Olmo2", "Olmo3", "Glm4", "Exaone4"),
    "factors on embeddings, attention or logits": ("Gemma", "Granite", "MiniCPM", "Cohere", "Cohere2", "Ministral3"),
    "attention and MLP side by side": ("Phi", "GPTNeoX", "GPTJ", "Falcon", "Cohere"),
    "layers that are not attention and an MLP": ("Mamba", "NemotronH", "Bamba", "FalconMamba", "RecurrentGemma", "Zamba", "Lfm2"),
}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")


def lacking(config: Mapping[str, Any]) -> str | None:
    """Feature of a model that the elastic model does not support, in words; None if unknown. config: content of config.json."""
    names = config.get("architectures")
    found = [
        (len(start), words)
        for name in (names if isinstance(names, list) else [])
        for words, starts in _LACKING.items()
        for start in starts
        if str(name).startswith(f"{start}For") or str(name).startswith(f"{start}LM")
    ]
    if found:
        return max(found)[1]
    if any(config.get(key) for key in _EXPERTS):
        return "experts (MoE)"
    return "inputs other than text" if "vision_config" in config or "audio_config" in config else None
