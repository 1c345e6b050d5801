"""`flextron export`: a sub-network as a directory that loads elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from flextron_mcore.config import FlextronError
from flextron_mcore.stages.common import check_output, new_output, print_table, write_metrics

FORMATS = ("hf",)


def run(config: DictConfig) -> dict[str, Any]:
    """Write config.subnetwork of config.checkpoint to config.out, and with verify=true read it back."""
    check_output(Path(config.out), config.overwrite)
    if config.format not in FORMATS:
        raise FlextronError(f"format={config.format!r} is not known: use one of {', '.join(FORMATS)}")
    from tqdm import tqdm

    from flextron_mcore.runtime import cpu

    cpu.enable()
    from flextron_mcore.checkpoint.store import open_checkpoint
    from flextron_mcore.export.hf import export_hf
    from flextron_mcore.space import SubNetwork, count_parameters

    info = open_checkpoint(config.checkpoint)
    net = SubNetwork.full(info.model)
    if config.subnetwork is not None:
        net = SubNetwork.from_file(config.subnetwork)
        info.space.check(info.model, net, str(config.subnetwork))
    with new_output(config) as out:
        with tqdm(unit="B", unit_scale=True, desc="export", disable=None) as bar:
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
    """Largest difference of logits between the exported directory in transformers and the sub-network in Megatron-Core (fp32)."""
    import torch
    from omegaconf import OmegaConf
    from transformers import AutoModelForCausalLM

    from flextron_mcore.model import use_subnetwork
    from flextron_mcore.runtime import distributed
    from flextron_mcore.stages.evaluate import loaded_model

    distributed.initialize(seed=config.seed)
    layout = OmegaConf.create(
        {"stage": "export", "trainer": {"precision": "fp32"}, "model": {"virtual_pipeline_model_parallel_size": None}}
    )
    length = min(info.model.max_position_embeddings, 64)
    tokens = torch.randint(0, info.model.vocab_size, (2, length), generator=torch.Generator().manual_seed(config.seed))
    exported = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32).eval()
    model = loaded_model(layout, info)[0]
    device = next(model.parameters()).device
    positions = torch.arange(length).expand(2, -1)
    with torch.no_grad(), use_subnetwork(model, net):
        ours = model(tokens.to(device), positions.to(device), None).float().cpu()
        theirs = exported(tokens).logits.float()
    difference = (ours - theirs).abs().max().item()
    allowed = _tolerance(info, config.dtype)
    if not difference <= allowed:
        raise FlextronError(f"export: logits differ by {difference:.2e} from the checkpoint's (at most {allowed:.0e} expected)")
    return difference


def _tolerance(info: Any, dtype: str | None) -> float:
    """What may differ: fp32 rounding, or where the export is in a narrower dtype than the checkpoint, that dtype's."""
    return 1e-4 if dtype in (None, info.dtype, "fp32") else 0.25
