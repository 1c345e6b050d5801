"""The whole report, from a synthetic run directory that keeps to the stages' contract."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.report import build_report
from flextron_mcore.report.page import big, duration, loss, memory, perplexity, spread
from flextron_mcore.space import ElasticSpace, LayerChoice, SubNetwork, count_parameters, kv_cache_bytes, weight_bytes

MODEL = ModelConfig(8, 256, 8, 8192, 512, ffn_hidden_size=1024)
SPACE = ElasticSpace.build(MODEL, granularity=2)
DOMAINS = {"prose": 0.15, "code": -0.25, "tables": 0.1}
SETTINGS = {"model": MODEL.to_dict(), "space": SPACE.to_dict()}


def networks() -> dict[str, SubNetwork]:
    """The full model, uniform networks, and random ones; one of them skips two layers."""
    rng, nets = random.Random(1), {"full": SubNetwork.full(MODEL)}
    for h, f in ((8, 512), (4, 1024), (6, 768), (4, 512), (4, 256), (2, 512), (2, 256)):
        nets[f"uniform {100 * h // 8}% heads {100 * f // 1024}% ffn"] = SPACE.uniform(MODEL, h, f)
    for i in range(4):
        layers = tuple(LayerChoice(True, rng.choice(SPACE.heads), 1, rng.choice(SPACE.ffn_hidden_size)) for _ in range(8))
        nets[f"random {i + 1}"] = SubNetwork(256, layers)
    full, skipped = LayerChoice(True, 8, 1, 1024), LayerChoice(False, 8, 1, 1024)
    nets["two layers skipped"] = SubNetwork(256, (full, full, full, skipped, skipped, full, full, full))
    return nets


def loss_of(net: SubNetwork, trained: bool) -> float:
    """Heads are cheaper to lose than FFN neurons, and a smaller network has a higher loss."""
    used = [(layer.num_attention_heads / 8, layer.ffn_hidden_size / 1024) for layer in net.layers if layer.executed]
    share = sum(0.3 * heads + 0.7 * ffn**0.8 for heads, ffn in used) / 8
    return 3.1 + 0.55 * (1 - share) if trained else 3.15 + 4.2 * (1 - share) ** 0.7


def evaluation(trained: bool) -> dict[str, Any]:
    rows = []
    for name, net in networks().items():
        per_domain = {domain: loss_of(net, trained) + shift for domain, shift in DOMAINS.items()}
        mean = sum(per_domain.values()) / len(per_domain)
        rows.append(
            {
                "name": name,
                "subnetwork": net.to_dict(),
                "parameters": count_parameters(MODEL, net),
                "non_embedding_parameters": count_parameters(MODEL, net, embeddings=False),
                "weight_bytes": weight_bytes(MODEL, net),
                "kv_cache_bytes": kv_cache_bytes(MODEL, net, 1, 512),
                "loss": per_domain,
                "perplexity": {domain: math.exp(value) for domain, value in per_domain.items()},
                "mean": {"loss": mean, "perplexity": math.exp(mean)},
                "something_new": 1,
            }
        )
    return {"stage": "evaluate", "networks": rows, **SETTINGS}


def training(kind: str, steps: int = 300) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng, rows = random.Random(kind), []
    elastic, start = kind == "elastic", 3.2 if kind == "elastic" else 9.0
    full_at = lambda step: 3.1 + (start - 3.1) * math.exp(-step / 60)  # noqa: E731
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "event": "train",
            "loss": full_at(step) + rng.gauss(0, 0.06),
            "learning_rate": 1e-3,
            "grad_norm": 1.0,
        }
        if elastic:
            row["subnetwork_losses"] = [
                full_at(step) + 0.4 + 2.5 * math.exp(-step / 40) + abs(rng.gauss(0, 0.25)) for _ in range(3)
            ]
        rows.append(row)
        if step == 1 or step % 30 == 0:
            nets = networks() if elastic else {"full": SubNetwork.full(MODEL)}
            fade = math.exp(-step / 50)
            losses = {
                n: full_at(step) + (1 - fade) * (loss_of(v, True) - 3.1) + fade * (loss_of(v, False) - 3.15)
                for n, v in nets.items()
            }
            rows.append({"step": step, "event": "validation", "losses": losses})
    ends = [row["losses"] for row in rows if row["event"] == "validation"]
    metrics = {"stage": kind, "steps": steps, "tokens": steps * 16384, "seconds": 412.4, "tokens_per_second": 11918.5, **SETTINGS}
    return {**metrics, "validation": {"first": ends[0], "last": ends[-1]}}, rows


def ablation() -> dict[str, Any]:
    cells = (("full (baseline)", "-", 3.15), ("50% heads", "unsorted", 4.02), ("50% heads", "sorted", 3.58))
    cells += (("50% ffn", "unsorted", 5.9), ("50% ffn", "sorted", 4.47))
    rows = [{"setup": s, "order": o, "loss": v, "perplexity": math.exp(v), "score": "activation"} for s, o, v in cells]
    return {"stage": "importance", "samples": 512, "score": "activation", "ablation": rows}


def write(directory: Path, metrics: dict[str, Any], log: list[dict[str, Any]] | None = None) -> None:
    directory.mkdir(parents=True)
    (directory / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    if log is not None:
        (directory / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log), encoding="utf-8")


def make_run(run: Path) -> Path:
    """A run with every stage, and one of a command that the report does not know."""
    sizes = {
        "prose": (3_500_000, 35_000, 812, 14_681_233),
        "code": (6_100_000, 61_000, 1_204, 22_020_911),
        "tables": (900_000, 9_000, 77, 1_999_001),
    }
    keys = ("train_tokens", "valid_tokens", "documents", "bytes")
    domains = {name: dict(zip(keys, values, strict=True)) for name, values in sizes.items()}
    write(run / "data", {"stage": "prepare", "vocab_size": 8192, "domains": domains})
    write(run / "pretrain", *training("pretrain"))
    write(run / "importance", ablation())
    write(run / "elastic", *training("elastic"))
    write(run / "evaluate_parent", evaluation(trained=False))
    write(run / "evaluate", evaluation(trained=True))
    write(run / "latency", {"stage": "latency", "blocks": []})
    for name, net in list(networks().items())[:2]:
        size = {"parameters": count_parameters(MODEL, net), "bytes": 2 * count_parameters(MODEL, net) + 4321}
        export = {"stage": "export", "format": "hf", "architecture": "LlamaForCausalLM", "path": str(run.resolve() / "export")}
        write(run / f"export_{name.split()[0]}", {**export, **size, "max_logit_difference": 3.1e-6 if name == "full" else None})
    return run
