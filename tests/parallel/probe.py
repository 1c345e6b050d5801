"""What the workers compute for the tests, in whatever layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from flextron_mcore.checkpoint.store import open_checkpoint
from flextron_mcore.config import FlextronError
from flextron_mcore.model import loaded_model
from flextron_mcore.pipeline.logits import forward_logits
from flextron_mcore.runtime import distributed
from flextron_mcore.runtime.ranks import wait_for_all
from flextron_mcore.space import SubNetwork
from flextron_mcore.stages.common import new_output
from tests import toy


def logits(checkpoint: str, layout: dict[str, Any], out: str, net: str | None = None, precision: str = "fp32") -> None:
    """forward_logits of a checkpoint's (sub-)network for fixed tokens, saved as OUT.RANK."""
    layout = {"virtual_pipeline_model_parallel_size": None, **layout}
    distributed.initialize(layout)
    info = open_checkpoint(checkpoint)
    tokens, _ = toy.inputs(batch=3, vocab=info.model.vocab_size)
    chunks = loaded_model(layout, info, precision)
    torch.save(forward_logits(chunks, SubNetwork.from_file(net) if net else None, tokens), f"{out}.{_rank()}")
    assert all(layer.mlp.choice is None for chunk in chunks for layer in chunk.modules() if hasattr(layer, "mlp"))


def failing_output(out: str, ranks: list[int], fatal: bool) -> None:
    """A stage that writes something on every rank, and then fails on `ranks`: with bad input, or `fatal` with the process."""
    with new_output(OmegaConf.create({"out": out, "overwrite": False})) as folder:
        (Path(folder) / f"part{_rank()}").write_text("something")
        wait_for_all()
        if _rank() in ranks:
            raise ValueError("fatal") if fatal else FlextronError("bad input")


def _rank() -> int:
    return torch.distributed.get_rank()
