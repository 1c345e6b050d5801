"""The scripts in examples/ run without edits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.stages.conftest import TRAIN, stage

ROOT = Path(__file__).resolve().parents[1]


def call(*command: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    env.update(OMP_NUM_THREADS="1", SAMPLES="16", ROUNDS="1", ROUTER_STEPS="4", PYTHONPATH=str(ROOT))
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)


def test_subnetworks_runs():
    result = call(sys.executable, str(ROOT / "examples" / "subnetworks.py"))
    assert result.returncode == 0, result.stderr
    counts = [int(line.split(" parameters")[0].split()[-1].replace(",", "")) for line in result.stdout.splitlines()[1:]]
    assert len(counts) == 4 and counts == sorted(counts) and result.stdout.splitlines()[-1].startswith("full ")


@pytest.fixture
def hf(text, tmp_path) -> Path:
    """Hugging Face directory of a random Llama of two layers, with a tokenizer."""
    stage("prepare", f"input=[{text}/code]", "vocab_size=300", "valid_fraction=0.2", f"out={tmp_path}/bpe")
    torch.manual_seed(8)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    AutoTokenizer.from_pretrained(tmp_path / "bpe" / "tokenizer").save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_the_tour_runs(hf, text, tmp_path):
    keys = [*TRAIN, "trainer.max_steps=4", "model.micro_batch_size=4", "model.global_batch_size=8"]
    command = [sys.executable, str(ROOT / "examples" / "tour.py"), str(hf), f"{text}/code", str(tmp_path / "tour"), *keys]
    result = call(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line for line in result.stdout.splitlines() if "validation loss" in line and "network_" in line]
    sizes = [int(line.split(": ")[1].split()[0].replace(",", "")) for line in rows]
    assert len(sizes) == 3 and sizes == sorted(set(sizes))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "tour/network_0.7")
    assert sum(p.numel() for p in loaded.parameters()) == sizes[0]
    assert (tmp_path / "tour/tour.png").stat().st_size > 1000


def test_the_chain_runs_and_skips_what_is_complete(hf, text, tmp_path):
    keys = [*TRAIN, "trainer.max_steps=4", "model.micro_batch_size=4", "model.global_batch_size=8"]
    command = [
        str(ROOT / "examples" / "chain.sh"),
        str(hf),
        f"[{text}/code,{text}/prose]",
        str(tmp_path / "run"),
        *keys,
    ]
    result = call(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    exported = json.loads((tmp_path / "run" / "export_smallest" / "metrics.json").read_text())
    family = json.loads((tmp_path / "run" / "report" / "family.json").read_text())["family"]
    assert exported["parameters"] == min(net["parameters"] for net in family)
    again = call(*command)
    assert again.returncode == 0 and not again.stdout, again.stdout + again.stderr
    assert call(str(ROOT / "examples" / "chain.sh")).returncode == 2
