"""From a Hugging Face directory to three networks, their losses and a plot.

    python examples/tour.py HF_DIR TEXT OUT [keys of `flextron elastic` ...]

For example: python examples/tour.py models/TinyLlama corpus/code tour trainer.precision=bf16 trainer.max_steps=2000
"""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from flextron_mcore import SubNetwork, export, select


def stage(name: str, *keys: str) -> Path:
    """Run `flextron NAME key=value ...` into a directory of its own, unless it is complete."""
    if not (out / name / "metrics.json").is_file():
        subprocess.run([sys.executable, "-m", "flextron_mcore", name, *keys, f"out={out / name}"], check=True)
    return out / name


hf, text, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])

# Text becomes tokens, the model a checkpoint, and its heads and neurons are sorted by importance.
data = f"data={stage('prepare', f'input={text}', f'tokenizer={hf}')}"
imported = stage("import", f"hf={hf}")
importance = stage("importance", f"checkpoint={imported}", data, "ablation_batches=0")

# The full model and random sub-networks of it are trained together; one set of weights serves all of them.
elastic = stage("elastic", f"checkpoint={importance}", data, *sys.argv[4:])

# Three networks, by their share of the parameters. Routers choose better than equal widths: docs/routing.md.
networks: dict[str, SubNetwork] = {}
for share in (0.7, 0.85, 1.0):
    net = networks[f"network_{share}"] = select(elastic, f"{share} parameters", selector="uniform")
    (out / f"network_{share}.json").write_text(net.to_json())
    if not (out / f"network_{share}").exists():  # an ordinary model directory, which transformers loads
        export(elastic, out / f"network_{share}", net)

# Losses on text that was kept for validation, and a plot of them.
files = ",".join(f"{out / name}.json" for name in networks)
found = json.loads((stage("evaluate", f"checkpoint={elastic}", data, f"subnetwork=[{files}]") / "metrics.json").read_text())
points = [(row["parameters"], row["mean"]["loss"]) for row in found["networks"]]
for name, (parameters, loss) in zip(networks, points, strict=True):
    print(f"{out / name}: {parameters:,} parameters, validation loss {loss:.3f}")

plt.plot(*zip(*points, strict=True), "o-")
plt.xlabel("parameters")
plt.ylabel("validation loss [nats per token]")
plt.savefig(out / "tour.png")
