"""GPU and CPU give the same results from the same weights: full model and sub-networks.

The reference is computed in fp32 by a process without a GPU, because Megatron-Core uses the GPU wherever it sees one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.parity import CASES, compute

# Largest difference relative to a tensor's largest value: devices sum in different orders.
FP32 = 1e-4
# RMS of the differences relative to RMS of the values. bf16 has 8 bits: a rounding is up to 0.4 %, and there are
# dozens between weights and a gradient. The bounds are twice the difference between bf16 and fp32 on a CPU.
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
    """(group, name, CPU's tensor, this device's tensor) of every compared tensor."""
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
    """The compared networks have different logits."""
    for case, values in reference.items():
        logits = values["logits"]
        assert (logits["full"] - logits["half"]).abs().max() > 0.1 < (logits["half"] - logits["mixed"]).abs().max()
        full, own = logits["levels, full"], logits["levels, own"]
        assert (full - logits["full"]).abs().max() > 0.1 and torch.equal(full, own) == ("query heads" in case)
