#!/usr/bin/env python3
"""Train baselines of a run of conf/recipe/smollm2.yaml on the same tokens, and print their losses beside its sub-networks'.

python scripts/study_peers.py STUDY OUT

STUDY: out of `flextron quickstart recipe=smollm2`. Each training has the steps, batches and learning rate of STUDY/elastic: the
family's uniform members each alone (cut from STUDY/sorted, then trained), the full model alone, the smallest member from random
weights, MatFormer's networks, and networks of fewer layers (LayerDrop's, but with the layers ranked). Interrupted, the same
command continues. OUT/peers.json has all losses.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

# keys of STUDY/elastic that every training takes over
SAME = (
    "trainer.max_steps",
    "model.seq_length",
    "model.global_batch_size",
    "model.micro_batch_size",
    "model.optim.lr",
    "model.optim.min_lr",
    "model.optim.sched.warmup_steps",
)
SHARES = (1.0, 0.75, 0.5, 0.25)  # shares of heads and of neurons; a network has the candidates nearest to them
DEPTHS = (1.0, 0.8, 0.6)  # shares of layers
# program that writes a model of the same config.json with random weights, and the tokenizer: arguments SOURCE OUT
RANDOM = """
import shutil, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.manual_seed(0)
source, out = sys.argv[1:]
AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source)).save_pretrained(out)
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(f"{source}/{name}", out)
"""


def main() -> None:
    """Run the trainings and evaluations whose results are not in OUT yet, and print the table."""
    if len(sys.argv) != 3:
        sys.exit("usage: python scripts/study_peers.py STUDY OUT")
    study, out = map(Path, sys.argv[1:])
    for name in ("data", "imported", "sorted", "elastic"):
        if not (study / name / "metrics.json").is_file():
            sys.exit(f"{study / name}: has no metrics.json: run `flextron quickstart recipe=smollm2` to its end first")
    out.mkdir(parents=True, exist_ok=True)
    config = yaml.safe_load((study / "elastic" / "config.yaml").read_text())
    data, length = f"data={study}/data", f"model.seq_length={value(config, 'model.seq_length')}"
    train = [data, *(f"{key}={value(config, key)}" for key in SAME), "trainer.val_at_start=false", "trainer.limit_val_batches=1"]
    rows: list[dict[str, Any]] = []

    def stage(name: str, kind: str, *keys: str) -> Path:
        """Run `flextron KIND key=value ...` into OUT/NAME, unless it is complete there."""
        if not (out / name / "metrics.json").is_file():
            print(f"== {name}", flush=True)
            subprocess.run([sys.executable, "-m", "flextron_mcore", kind, *keys, f"out={out / name}"], check=True)
        return out / name

    def evaluate(training: str, checkpoint: Path, networks: list[Path]) -> None:
        """Evaluate networks of a checkpoint, and add a row for each to the table.

        Args:
            training: name of the training, for the table.
            checkpoint: out of a stage.
            networks: files of the networks.
        """
        keys = [f"checkpoint={checkpoint}", data, length, f"subnetwork=[{','.join(map(str, networks))}]"]
        keys += ["model.micro_batch_size=2", "limit_val_batches=16"]
        found = json.loads((stage(f"losses_{training}", "evaluate", *keys) / "metrics.json").read_text())["networks"]
        for network, row in zip(networks, found, strict=True):
            rows.append({"network": network.stem, "training": training, "parameters": row["parameters"], **row["loss"]})

    def alone(name: str, imported: Path) -> None:
        """Train an imported model without sub-networks, and evaluate it.

        Args:
            name: name of the model, for the table and the directories.
            imported: out of `flextron import`.
        """
        trained = stage(f"alone_{name}", "elastic", f"checkpoint={imported}", "num_subnetworks=0", *train)
        evaluate(f"alone_{name}", trained, write_networks(trained, out / f"whole_{name}", heads=(1.0,)))

    members = write_networks(study / "sorted", out / "members", heads=SHARES)
    evaluate("before", study / "sorted", members)
    evaluate("family", study / "elastic", members)
    alone("full", study / "imported")
    for member in members[1:]:
        cut = stage(f"cut_{member.stem}", "export", f"checkpoint={study}/sorted", f"subnetwork={member}", "verify=false")
        alone(member.stem, stage(f"imported_{member.stem}", "import", f"hf={cut}"))
    if not (out / "random" / "config.json").is_file():
        subprocess.run([sys.executable, "-c", RANDOM, str(cut), str(out / "random")], check=True)
    alone("random_weights", stage("imported_random", "import", f"hf={out / 'random'}"))
    matformer = stage("matformer", "elastic", f"checkpoint={study}/sorted", "mode=matformer", *train)
    evaluate("matformer", matformer, write_networks(study / "sorted", out / "neurons", ffn=SHARES))
    ranked = [f"checkpoint={study}/imported", data, length, "samples=64", "model.micro_batch_size=4", "ablation_batches=0"]
    ranked += ["space.heads=[1.0]", "space.ffn_hidden_size=[1.0]", f"space.depth=[{','.join(map(str, sorted(DEPTHS)))}]"]
    layers = stage("ranked", "importance", *ranked)
    depths = write_networks(layers, out / "layers", depth=DEPTHS)
    evaluate("layers_before", layers, depths)
    evaluate("layers", stage("layerdrop", "elastic", f"checkpoint={layers}", *train), depths)
    (out / "peers.json").write_text(json.dumps(rows, indent=1))
    for row in rows:
        losses = {key: loss for key, loss in row.items() if isinstance(loss, float)}
        mean = sum(losses.values()) / len(losses)
        each = ", ".join(f"{domain} {loss:.3f}" for domain, loss in losses.items())
        print(f"| {row['network']} | {row['training']} | {row['parameters']:,} | {mean:.4f} | {each} |")


def value(config: dict[str, Any], key: str) -> Any:
    """Value of a dotted key of a configuration, as it is typed on the command line."""
    for part in key.split("."):
        config = config[part]
    return "null" if config is None else config


def write_networks(
    checkpoint: Path,
    folder: Path,
    heads: tuple[float, ...] = (),
    ffn: tuple[float, ...] = (),
    depth: tuple[float, ...] = (),
) -> list[Path]:
    """Write uniform networks of a checkpoint as files, and return them in order.

    Args:
        checkpoint: out of a stage.
        folder: directory for the files.
        heads: shares of the full model's heads and neurons, a network each.
        ffn: shares of its neurons alone.
        depth: shares of its layers.
    """
    from flextron_mcore.checkpoint.store import open_checkpoint

    info = open_checkpoint(checkpoint)
    model, space = info.model, info.space
    full = {"heads": model.num_attention_heads, "ffn_hidden_size": model.ffn_hidden_size, "depth": model.num_layers}
    axes = [(("heads", "ffn_hidden_size"), heads), (("ffn_hidden_size",), ffn), (("depth",), depth)]
    folder.mkdir(exist_ok=True)
    files = []
    for names, shares in axes:
        for share in shares:
            sizes = {name: min(space.sizes[name], key=lambda size: abs(size - share * full[name])) for name in names}
            file = folder / f"{'_'.join(names)}_{share:.0%}.json".replace("%", "")
            file.write_text(space.uniform(model, **sizes).to_json())
            files.append(file)
    return files


if __name__ == "__main__":
    main()
