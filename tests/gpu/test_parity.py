"""The GPU computes what the CPU does: full and sub-networks, from the same weights.

The reference is the CPU's in fp32, from a process of its own: Megatron-Core uses the GPU wherever it sees one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.parity import CASES, compute

# Largest difference over the largest value of a tensor: devices sum in different orders.
FP32 = 1e-4
# Root mean square of the differences over that of the values. bf16 keeps 8 bits: each rounding is up to 0.4 %, and there are
# dozens between the weights, which are the same, and a gradient. These are twice what bf16 differs by on a CPU.
BF16 = {"logits": 0.025, "decoded": 0.025, "losses": 0.001, "gradients": 0.05, "scores": 0.006}


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("parity") / "cpu.pt"
    launch = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launch}
    command = [sys.executable, "-m", "tests.gpu.parity", str(file)]
    subprocess.run(command, env={**environment, "CUDA_VISIBLE_DEVICES": ""}, cwd=Path(__file__).parents[2], check=True)
    return torch.load(file)


def compared(case: str, precision: str, reference: dict):
    """(group, name, what the CPU found, what this device finds) of every tensor."""
    expected = reference[case]
    found = compute(case, precision, expected["state"])
    for group in expected.keys() - {"state"}:
        assert found[group].keys() == expected[group].keys() and expected[group]
        for name, tensor in expected[group].items():
            assert found[group][name].shape == tensor.shape and tensor.abs().max() > 0, f"{group} {name}"
            yield group, name, tensor, found[group][name]


@pytest.mark.parametrize("case", CASES)
def test_fp32(case, reference):
    for group, name, expected, found in compared(case, "fp32", reference):
        error = ((found - expected).abs().max() / expected.abs().max()).item()
        assert error < FP32, f"{group} {name}: {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_bf16(case, reference):
    for group, name, expected, found in compared(case, "bf16", reference):
        error = ((found - expected).square().mean() / expected.square().mean()).sqrt().item()
        assert error < BF16[group], f"{group} {name}: {error:.3f}"


def test_sub_networks_differ(reference):
    """What is compared is not the same network every time."""
    for case, values in reference.items():
        logits = values["logits"]
        assert (logits["full"] - logits["half"]).abs().max() > 0.1 < (logits["half"] - logits["mixed"]).abs().max()
        full, own = logits["levels, full"], logits["levels, own"]
        assert (full - logits["full"]).abs().max() > 0.1 and torch.equal(full, own) == ("query heads" in case)
