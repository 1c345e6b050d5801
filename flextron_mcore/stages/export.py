"""`flextron export`: a sub-network as a directory that loads elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from flextron_mcore.config import FlextronError
from flextron_mcore.runtime.ranks import on_main_process
from flextron_mcore.stages.choice import select
from flextron_mcore.stages.common import check_output, new_output, print_table, progress_bar, start, write_metrics

FORMATS = ("hf",)


def run(config: DictConfig) -> dict[str, Any]:
    """Write config.subnetwork of config.checkpoint to config.out, and with verify=true read it back. Ranks share the shards."""
    check_output(Path(config.out), config.overwrite)
    if config.format not in FORMATS:
        raise FlextronError(f"format={config.format!r} is not known: use one of {', '.join(FORMATS)}")
    start(config)
    from flextron_mcore.checkpoint.store import open_checkpoint
    from flextron_mcore.export.hf import export_hf
    from flextron_mcore.model import check_layout
    from flextron_mcore.space import SubNetwork, count_parameters

    info = open_checkpoint(config.checkpoint)
    net = SubNetwork.full(info.model)
    if config.budget is not None:
        if config.subnetwork is not None:
            raise FlextronError("subnetwork= and budget= are two ways to say which network: give one")
        net, _ = select(config, info)
    elif config.subnetwork is not None:
        net = SubNetwork.from_file(config.subnetwork)
        info.space.check(info.model, net, str(config.subnetwork))
    if config.verify:
        check_layout(info.model, info.space, config.model)
    with new_output(config) as out:
        with progress_bar(unit="B", unit_scale=True, desc="export") as bar:
            figures = export_hf(info, net, out, config.dtype, config.max_shard_size, info.tokenizer, bar.update)
        if figures["parameters"] != count_parameters(info.model, net):
            raise FlextronError(f"export: wrote {figures['parameters']} parameters, counted {count_parameters(info.model, net)}")
        figures["max_logit_difference"] = _verify(config, info, net, out) if config.verify else None
        metrics = write_metrics(out, "export", {**figures, "path": str(config.out), "subnetwork": net.to_dict()})
    print_table(
        f"exported to {config.out}",
        ["format", "architecture", "parameters", "bytes", "largest logit difference"],
        [
            [
                figures["format"],
                figures["architecture"],
                figures["parameters"],
                figures["bytes"],
                str(figures["max_logit_difference"]),
            ]
        ],
    )
    return metrics


def _verify(config: DictConfig, info: Any, net: Any, out: Path) -> float:
    """Largest difference of logits between the exported directory in transformers and the sub-network in Megatron-Core (fp32).

    The checkpoint is computed at the layout of `config`, the directory on the main process.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from flextron_mcore.model import loaded_model
    from flextron_mcore.pipeline.logits import forward_logits

    length = min(info.model.max_position_embeddings, 64)
    if config.model.sequence_parallel:
        length -= length % config.model.tensor_model_parallel_size
    tokens = torch.randint(0, info.model.vocab_size, (2, length), generator=torch.Generator().manual_seed(config.seed))
    ours = forward_logits(loaded_model(config.model, info, "fp32"), net, tokens).cpu()

    def difference() -> float:
        exported = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
        with torch.no_grad():
            found = (ours - exported(tokens).logits).abs().max().item()
        allowed = _tolerance(info, config.dtype)
        if not found <= allowed:
            raise FlextronError(f"export: logits differ by {found:.2e} from the checkpoint's (at most {allowed:.0e} expected)")
        return found

    return on_main_process(difference)


def _tolerance(info: Any, dtype: str | None) -> float:
    """What may differ: fp32 rounding, or where the export is in a narrower dtype than the checkpoint, that dtype's."""
    return 1e-4 if dtype in (None, info.dtype, "fp32") else 0.25
