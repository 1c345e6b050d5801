"""Peak throughput of known GPUs, from the recipes of conf/gpu. No torch import."""

from __future__ import annotations

import re

from flextron_mcore.settings.compose import config_directory


def peak_tflops(name: str) -> float | None:
    """Dense bf16 peak of a GPU in TFLOP/s; None if it is not known.

    name: name of the device as CUDA gives it, such as "NVIDIA H100 80GB HBM3". The recipes are of SXM modules; of the PCIe and
    NVL cards only the A100 computes as fast.
    """
    from omegaconf import OmegaConf  # late: slow, and needed on GPUs only

    words = re.split(r"[^0-9a-z]+", name.lower())
    for file in (config_directory() / "gpu").glob("*.yaml"):
        if file.stem in words and (file.stem == "a100" or not {"pcie", "nvl"} & set(words)):
            return float(OmegaConf.load(file).gpu.peak_tflops)
    return None
