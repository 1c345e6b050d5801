"""Training on existing Megatron corpora: the losses of prepared data, the same run on resume, and keys that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from flextron_mcore.config import FlextronError
from flextron_mcore.settings.compose import compose
from tests.stages.conftest import TRAIN, stage

SIZES = ["model.micro_batch_size=4", "model.global_batch_size=8", *TRAIN, "trainer.max_steps=6"]
DOMAINS = ("code", "prose")


def elastic(chain: Path, data: Path, out: Path, *more: str) -> list[list[float]]:
    """Losses of all networks in each step of `elastic` on data."""
    stage("elastic", f"checkpoint={chain}/sorted", f"data={data}", f"out={out}", *SIZES, *more)
    return losses(out)


def losses(run: Path) -> list[list[float]]:
    rows = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [[row["step"], row["loss"], *row["subnetwork_losses"]] for row in rows if row["event"] == "train"]


def describe(chain: Path, out: Path, paths: str, *more: str) -> dict:
    return stage("prepare", f"paths={paths}", f"tokenizer={chain}/data/tokenizer", f"out={out}", *more)


@pytest.fixture(scope="module")
def joined(chain: Path, tmp_path_factory) -> tuple[Path, str]:
    """(prefix of a corpus with the training documents of `code` and then its validation documents, the split between them)."""
    root = tmp_path_factory.mktemp("joined")
    builder = IndexedDatasetBuilder(f"{root}/code.bin", dtype=IndexedDataset(f"{chain}/data/code_train").index.dtype)
    counts = []
    for part in ("train", "valid"):
        source = IndexedDataset(f"{chain}/data/code_{part}")
        counts.append(len(source))
        for i in range(len(source)):
            builder.add_item(torch.from_numpy(source[i].astype("int64")))
            builder.end_document()
    builder.finalize(f"{root}/code.idx")
    return root / "code", f"{counts[0]},{counts[1]},0"


def test_losses_are_those_of_prepared_data(chain: Path, joined, tmp_path: Path) -> None:
    """Losses are those of `prepare`'s data to the bit: for its files as `paths`, and for one corpus with the same split."""
    train, valid = ([f"{chain}/data/{name}_{part}" for name in DOMAINS] for part in ("train", "valid"))
    describe(chain, tmp_path / "data", f"{{train: [3,{train[0]},1,{train[1]}], validation: [{','.join(valid)}]}}")
    wanted = elastic(chain, chain / "data", tmp_path / "wanted", "data_weights={code: 3, prose: 1}")
    assert elastic(chain, tmp_path / "data", tmp_path / "found") == wanted
    prefix, split = joined
    describe(chain, tmp_path / "joined", f"[{prefix}]", f"split={split}")
    wanted = elastic(chain, chain / "data", tmp_path / "wanted_code", "data_weights={code: 1}")
    assert elastic(chain, tmp_path / "joined", tmp_path / "found_code") == wanted
    ours, theirs = (
        json.loads((tmp_path / run / "metrics.json").read_text())["validation"] for run in ("found_code", "wanted_code")
    )
    rows = [json.loads(line) for line in (tmp_path / "wanted_code" / "log.jsonl").read_text().splitlines()]
    of_code = {name: found["code"] for name, found in rows[-1]["domains"].items()}
    assert ours["last"] == of_code != theirs["last"]


def test_other_data_are_another_run(chain: Path, joined, tmp_path: Path) -> None:
    """A run continues on corpora that have moved, and is refused with another weight, split or content."""
    prefix, split = joined
    mine = tmp_path / "mine" / "code"
    shutil.copytree(prefix.parent, mine.parent)
    describe(chain, tmp_path / "data", f"[{mine}]", f"split={split}")
    wanted = elastic(chain, tmp_path / "data", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "iter_0000006")
    (tmp_path / "run" / "metrics.json").unlink()
    describe(chain, tmp_path / "other", f"[{mine}]", "split=[60,40]")
    with pytest.raises(FlextronError, match="other data"):
        elastic(chain, tmp_path / "other", tmp_path / "run")
    shutil.move(mine.parent, tmp_path / "moved")
    with pytest.raises(FlextronError, match="code.idx: cannot be read"):
        elastic(chain, tmp_path / "data", tmp_path / "run")
    describe(chain, tmp_path / "data", f"[{tmp_path}/moved/code]", f"split={split}", "overwrite=true")
    assert elastic(chain, tmp_path / "data", tmp_path / "run") == wanted


def test_the_keys_of_nemo_are_answered(tmp_path: Path) -> None:
    with pytest.raises(FlextronError, match=r"unknown key .data.paths.: .*`flextron prepare paths="):
        stage("elastic", "data.paths=[0.7,/d/web,0.3,/d/code]", f"out={tmp_path}/out")
    with pytest.raises(FlextronError, match="trainer.precision='16-mixed' is not known: use one of fp32, bf16"):
        stage("elastic", "trainer.precision=16-mixed", f"out={tmp_path}/out")
    assert compose("elastic", ["trainer.precision=bf16-mixed"], partial=True).trainer.precision == "bf16"
    assert compose("evaluate", ["trainer.precision=32-true"], partial=True).trainer.precision == "fp32"


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ([], "missing input=..."),
        (["paths=[a]", "input=builtin", "tokenizer=t"], "two sources"),
        (["paths=[a]"], "tokenizer is not set"),
        (["paths=[0.5,a,b]", "tokenizer=t"], "as many weights"),
        (["paths={train: [a]}", "tokenizer=t"], "validation"),
    ],
)
def test_keys_that_do_not_fit_are_refused(tmp_path: Path, keys: list[str], reason: str) -> None:
    with pytest.raises(FlextronError, match=reason) as error:
        stage("prepare", *keys, f"out={tmp_path}/out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
