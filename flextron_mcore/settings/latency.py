"""Schema of `flextron latency` and of the measured workload. No torch import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flextron_mcore.settings.schema import MISSING, path, section, setting
from flextron_mcore.settings.sections import PrecisionSettings
from flextron_mcore.settings.training import WeightsSettings


@dataclass
class WorkloadSettings:
    """Section `setting`: workload whose latency is measured, prefill or generation, with batch size and lengths."""

    kind: str = setting(
        "prefill",
        "prefill: one forward pass over a prompt; generation: a prompt, then one token at a time with a KV cache",
        choices=("prefill", "generation"),
    )
    batch_size: int = setting(2, "sequences of the batch", at_least=1)
    prompt_length: int | None = setting(
        None,
        "length of the prompt; null: the model's max_position_embeddings, at most 4096, and half as many for generation",
        unit="tokens",
        at_least=1,
    )
    generated_tokens: int = setting(
        64, "tokens generated after the prompt", unit="tokens", at_least=1, only="setting.kind=generation"
    )


@dataclass
class RoutedLatencySettings:
    """Section `routed`: latency measurements of blocks with token-by-token routing (adaptive routers)."""

    enabled: bool = setting(False, "measure blocks with token-by-token routing too, for adaptive routers")
    hidden_size: int = setting(64, "hidden units of the routers that are timed", at_least=1, only="routed.enabled=true")
    rounds: int = setting(10, "repetitions of every measurement", at_least=1, ceiling=10**6, only="routed.enabled=true")


@dataclass
class LatencySettings(WeightsSettings):
    """Measure the latency of every candidate of every block on this device, or fit latencies to given measurements."""

    stage: ClassVar[str] = "latency"

    checkpoint: str = path(MISSING, "checkpoint directory: the out of another stage")
    measurements: str | None = path(
        None,
        'JSON file of latencies measured elsewhere, [{"subnetwork": {...} or a file, "ms": 12.3}, ...], to fit the table to; '
        "null: measure on this device",
    )
    rounds: int = setting(20, "repetitions of the measurement of every candidate in every layer", at_least=1, ceiling=10**6)
    check_networks: int = setting(
        20, "random networks timed whole, to report the error of the table's sums; 0: no check", at_least=0, ceiling=10**6
    )
    routed: RoutedLatencySettings = section(RoutedLatencySettings)
    trainer: PrecisionSettings = section(PrecisionSettings)
    # The last field, because its name hides the function `setting` in the lines below it.
    setting: WorkloadSettings = section(WorkloadSettings)
