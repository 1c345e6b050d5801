"""`python -m benchmarks.modelopt IMPORTED DATA`: pruning without training, by this package and by ModelOpt's Minitron.

IMPORTED: out of `flextron import`. DATA: out of `flextron prepare`. Needs nvidia-modelopt 0.42 beside this package's environment.
Prints the loss of each pruned network. Both packages compute importance scores from the same `samples=` training samples, and
their networks are evaluated on the same `sequences=` validation samples of each domain.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.stream import MEASURE, run_command
from benchmarks.trained import command
from flextron_mcore.config import FlextronError

DEPTH, HIDDEN, FFN = 0.8, 0.75, 0.5


@dataclass(frozen=True)
class Shape:
    """Network with the same widths in every layer, as arguments of both packages.

    Attributes:
        name: name in the table.
        unit: space.attention_unit of this package.
        sizes: {axis: size}, arguments of `ElasticSpace.uniform` of this package.
        theirs: ModelOpt's export_config; None if ModelOpt cannot prune to this network.
    """

    name: str
    unit: str
    sizes: dict[str, int]
    theirs: dict[str, int] | None


def shapes(model: Any) -> list[Shape]:
    """Networks to compare: fewer query heads a KV group, KV groups, neurons, channels or layers, or neurons and channels."""
    groups, each = model.num_query_groups, model.query_heads_per_group
    ffn, hidden, depth = (
        int(part * size) for part, size in ((FFN, model.ffn_hidden_size), (HIDDEN, model.hidden_size), (DEPTH, model.num_layers))
    )
    found = [
        Shape(
            f"{groups * kept} of {groups * each} heads",
            "query_head",
            {"heads": groups * kept},
            {"num_attention_heads": groups * kept},
        )
        for kept in range(each - 1, 0, -1)
    ]
    if groups > 1:
        found.append(Shape(f"{groups - 1} of {groups} KV groups", "kv_group", {"heads": (groups - 1) * each}, None))
    narrow = {"ffn_hidden_size": ffn}
    thin = {"hidden_size": hidden}
    for name, sizes in (
        (f"{ffn} of {model.ffn_hidden_size} neurons", narrow),
        (f"{hidden} of {model.hidden_size} channels", thin),
        (f"{depth} of {model.num_layers} layers", {"depth": depth}),
        (f"{ffn} neurons, {hidden} channels", {**narrow, **thin}),
    ):
        theirs = {"num_layers" if axis == "depth" else axis: size for axis, size in sizes.items()}
        found.append(Shape(name, "query_head" if each > 1 else "kv_group", sizes, theirs))
    return found


def _run(imported: str, data: str, *, samples: int = 64, sequences: int = 64, seq_length: int = 512, seed: int = 1234) -> None:
    import torch

    from benchmarks import print_settings
    from flextron_mcore.checkpoint.store import open_checkpoint
    from flextron_mcore.data.blend import open_data, train_dataset, valid_datasets
    from flextron_mcore.runs.terminal import print_table

    prune, info = _minitron(), open_checkpoint(imported)
    print_settings(
        "modelopt: loss before any training (nats per token, mean over domains) of networks that are cut from one model",
        f"{samples} x {seq_length} tokens to score, {sequences} x {seq_length} of each domain to evaluate, seed {seed}, fp32",
    )
    wanted = shapes(info.model)
    with tempfile.TemporaryDirectory(prefix="flextron-modelopt-") as name:
        folder = Path(name)
        text = open_data(data)
        calibration = train_dataset(text, seq_length, samples, seed, folder / "cache")
        datasets = valid_datasets(text, seq_length, seed, folder / "cache")
        ours = _ours(imported, data, wanted, folder, datasets, samples, sequences, seq_length, seed)
        with torch.no_grad():
            theirs = _theirs(imported, wanted, folder, prune, calibration, datasets, samples, sequences)
    rows = []
    for label in ours["losses"]:
        mine, other = ours["losses"][label], theirs["losses"].get(label)
        rows.append(
            [label, f"{mine:.4f}", "-" if other is None else f"{other:.4f}", "-" if other is None else f"{mine - other:+.4f}"]
        )
    print_table("modelopt", ["network", "here", "ModelOpt", "difference"], rows)
    for side, found in (("here", ours), ("ModelOpt", theirs)):
        print(f"{side}: " + "; ".join(found["costs"]))


def _ours(
    imported: str,
    data: str,
    wanted: list[Shape],
    folder: Path,
    datasets: Any,
    samples: int,
    sequences: int,
    length: int,
    seed: int,
) -> dict[str, Any]:
    """Losses of networks of checkpoints that `flextron importance` sorted.

    Returns:
        {"losses": {network: loss}, "costs": lines of processor time and memory}.
    """
    import json

    from flextron_mcore.checkpoint.store import open_checkpoint
    from flextron_mcore.evaluation.perplexity import evaluate, mean
    from flextron_mcore.model import loaded_model
    from flextron_mcore.settings.sections import LayoutSettings

    losses: dict[str, float] = {}
    costs = []
    model = open_checkpoint(imported).model
    for unit in dict.fromkeys(shape.unit for shape in wanted):
        own = [shape for shape in wanted if shape.unit == unit]
        space: dict[str, set[int]] = {
            "heads": {model.num_attention_heads},
            "ffn_hidden_size": {model.ffn_hidden_size},
            "hidden_size": {model.hidden_size},
            "depth": {model.num_layers},
        }
        for shape in own:
            for axis, size in shape.sizes.items():
                space[axis].add(size)
        keys = [f"space.{axis}=[{','.join(map(str, sorted(sizes)))}]" for axis, sizes in space.items()]
        out = folder / unit
        code, peak, _, user, system = json.loads(
            run_command(
                [
                    *(sys.executable, "-c", MEASURE, sys.executable, "-m", "flextron_mcore", "importance"),
                    *(f"checkpoint={imported}", f"data={data}", f"out={out}", f"seed={seed}", f"samples={samples}"),
                    *(f"model.seq_length={length}", "model.micro_batch_size=4", "ablation_batches=0"),
                    *(f"space.attention_unit={unit}", "space.granularity=1", *keys),
                ]
            )
        )
        if code:
            sys.exit(f"importance failed with exit code {code}")
        costs.append(f"importance with {unit} {user + system:.0f} s of processor time, {peak / 1e9:.2f} GB")
        info = open_checkpoint(out)
        networks = {"full model": None} | {shape.name: info.space.uniform(info.model, **shape.sizes) for shape in own}
        chunks = loaded_model(LayoutSettings(), info, "fp32")
        found = evaluate(chunks, datasets, networks, length, 4, sequences, lambda name: print(name, file=sys.stderr))
        losses = {**{label: mean(values) for label, values in found.items()}, **losses}
    return {"losses": losses, "costs": costs}


def _theirs(
    imported: str,
    wanted: list[Shape],
    folder: Path,
    prune: Callable[..., Any],
    calibration: Any,
    datasets: Any,
    samples: int,
    sequences: int,
) -> dict[str, Any]:
    """Losses of networks that ModelOpt's mcore_minitron prunes from Megatron-Core's stock layers.

    Returns:
        {"losses": {network: loss}, "costs": lines of processor time}.
    """
    from flextron_mcore.data.blend import batch

    run_command(
        [
            *(sys.executable, "-m", "flextron_mcore", "export", f"checkpoint={imported}", "format=megatron"),
            *("dtype=fp32", "verify=false", f"out={folder / 'stock'}"),
        ]
    )
    stock = _module(folder / "stock" / "load_model.py")

    def forward_loop(model: Any) -> None:
        for first in range(0, samples, 4):
            tokens = batch(calibration, range(first, min(first + 4, samples)))["tokens"]
            stock.logits(model, tokens)

    losses, costs = {"full model": _loss(stock, stock.load(), datasets, sequences)}, []
    for shape in wanted:
        if shape.theirs is None:
            continue
        model, begun = stock.load(), time.process_time()
        with contextlib.redirect_stdout(sys.stderr):
            prune(
                model,
                constraints={"export_config": dict(shape.theirs)},
                config={"forward_loop": forward_loop, "scores_path": str(folder / "scores.pth")},
            )
        if not costs:
            costs.append(f"scores of all axes and the first cut {time.process_time() - begun:.0f} s of processor time")
        losses[shape.name] = _loss(stock, model, datasets, sequences)
        print(f"ModelOpt: {shape.name} {losses[shape.name]:.4f}", file=sys.stderr)
    return {"losses": losses, "costs": costs}


def _module(file: Path) -> ModuleType:
    """Module of a Python file outside of packages."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def _minitron() -> Callable[..., Any]:
    """ModelOpt's `prune` for mcore_minitron, changed so that it prunes PyTorch's RMSNorm, too, and runs without a GPU."""
    import torch

    if importlib.util.find_spec("modelopt") is None:
        raise FlextronError("modelopt: the package nvidia-modelopt is missing: pip install nvidia-modelopt==0.42.0")
    from modelopt.torch.nas.plugins.megatron import _DynamicFusedLayerNorm
    from modelopt.torch.nas.registry import DMRegistry
    from modelopt.torch.prune import prune
    from modelopt.torch.prune.plugins.mcore_minitron import get_mcore_minitron_config

    class DynamicRMSNorm(_DynamicFusedLayerNorm):
        def _setup(self, *, num_features: Any) -> None:
            self._register_hparam("num_features", num_features)
            self._register_dynamic_attribute("weight", self._cut_to_active_features)
            self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)

    DMRegistry.register({torch.nn.RMSNorm: "torch.nn.RMSNorm"})(DynamicRMSNorm)
    if not torch.cuda.is_available():
        # ModelOpt moves a scalar to the GPU and gathers it over ranks, which gloo refuses; there is one process here.
        torch.Tensor.cuda = lambda tensor, *_, **__: tensor
        torch.distributed.all_gather_into_tensor = lambda out, tensor, group=None: out.copy_(tensor)
    sizes = dict.fromkeys(("hidden_size_divisor", "ffn_hidden_size_divisor", "num_layers_divisor"), 1)  # any size
    return partial(prune, mode=[("mcore_minitron", get_mcore_minitron_config(**sizes))], dummy_input=None)


def _loss(stock: ModuleType, model: Any, datasets: Any, sequences: int) -> float:
    """Loss of a stock model in nats per token, a mean over domains.

    Args:
        stock: module load_model.py of an export with format=megatron.
        model: model of Megatron-Core.
        datasets: {domain: dataset}.
        sequences: number of samples of each domain that are read, from the first on.
    """
    from torch.nn.functional import cross_entropy

    from flextron_mcore.data.blend import batch
    from flextron_mcore.evaluation.perplexity import mean

    model.eval()
    losses = {}
    for name, dataset in datasets.items():
        total = count = 0.0
        for first in _starts(min(sequences, len(dataset))):
            each = batch(dataset, first)
            of_tokens = cross_entropy(
                stock.logits(model, each["tokens"]).flatten(0, 1).float(), each["labels"].flatten(), reduction="none"
            )
            total += (of_tokens * each["loss_mask"].flatten()).sum().item()
            count += each["loss_mask"].sum().item()
        losses[name] = total / count
    return mean(losses)


def _starts(count: int) -> Iterator[range]:
    """Ranges of at most four indices that cover `count` of them."""
    for first in range(0, count, 4):
        yield range(first, min(first + 4, count))


if __name__ == "__main__":
    command(__doc__, 2, _run)
