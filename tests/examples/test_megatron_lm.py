"""examples/megatron_lm: Megatron-LM's loop has the losses of `flextron elastic`. Needs Megatron-Core with megatron.training."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flextron_mcore.checkpoint.store import open_checkpoint
from tests.examples.conftest import STEPS
from tests.stages.conftest import stage

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "megatron_lm" / "pretrain_elastic.py"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None, reason="this Megatron-Core has no megatron.training"
)
MODEL = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --seq-length 32 --max-position-embeddings 32
    --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0
    --transformer-impl local --use-cpu-initialization --no-masked-softmax-fusion --no-gradient-accumulation-fusion
    --no-persist-layer-norm --no-rope-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --distributed-backend gloo
""".split()
TRAIN = f"""
    --micro-batch-size 4 --global-batch-size 32 --train-iters {STEPS} --lr-decay-iters {STEPS} --eval-iters 1 --eval-interval 100
    --lr 5e-4 --min-lr 5e-5 --lr-decay-style cosine --lr-warmup-iters 2 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95
    --log-interval 1 --num-workers 0
""".split()


def pretrain(run: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """Run the example on the data of `run`, as a user starts it, and return the finished process."""
    data = [
        *("--train-data-path", "0.5", f"{run}/data/code_train", "0.5", f"{run}/data/prose_train"),
        *("--valid-data-path", "1", f"{run}/data/code_valid", "--data-cache-path", f"{run}/cache"),
        *("--tokenizer-model", f"{run}/data/tokenizer", "--make-vocab-size-divisible-by", "1"),
    ]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [*torchrun, str(SCRIPT), *MODEL, *TRAIN, *data, *arguments],
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


def losses(result: subprocess.CompletedProcess[str]) -> dict[int, list[float]]:
    """{iteration: losses of the full model and the sub-networks}, from Megatron-LM's output."""
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line for line in (result.stdout + result.stderr).splitlines() if "consumed samples:" in line]
    return {
        int(re.search(r"iteration +(\d+)/", line)[1]): [float(x) for x in re.findall(r"loss: (\S+) \|", line)][:4]
        for line in lines
    }


def expected(rows: list[dict], first: int = 1) -> dict[int, list[float]]:
    """{iteration: losses of `elastic`} from `first` on. The second is the mean of the first two, which Megatron-LM logs there."""
    found = {row["step"]: [row["loss"], *row["subnetwork_losses"]] for row in rows if row["step"] >= first}
    found[first + 1] = [(a + b) / 2 for a, b in zip(found[first], found[first + 1], strict=True)]
    return found


def assert_equal(found: dict[int, list[float]], wanted: dict[int, list[float]]) -> None:
    assert found.keys() == wanted.keys()
    for step, values in wanted.items():
        assert found[step] == pytest.approx(values, abs=1e-5), step


def test_equals_our_loop_resumes_and_comes_back(ours, tmp_path):
    run, rows = ours
    start = ["--flextron-checkpoint", f"{run}/sorted", "--save", str(tmp_path), "--save-interval", "3"]
    assert_equal(losses(pretrain(run, *start, "--spec", "flextron_mcore.specs", "elastic_layer_spec")), expected(rows))
    assert len({round(value, 4) for value in expected(rows)[STEPS]}) > 1  # losses differ, so the networks do

    # Megatron-LM continues from its checkpoint, also at another layout, with the same samples and networks.
    layout = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    resumed = pretrain(run, *start[:2], "--load", str(tmp_path), "--ckpt-step", "3", *layout, processes=2)
    assert_equal(losses(resumed), expected(rows, first=4))

    # `flextron` opens the checkpoint, too.
    info = open_checkpoint(tmp_path / f"iter_{STEPS:07d}")
    assert info.sorted and info.step == STEPS
    keys = [f"data={run}/data", "limit_val_batches=1"]
    theirs = stage("evaluate", f"checkpoint={info.path}", *keys, f"out={tmp_path}/theirs")
    own = stage("evaluate", f"checkpoint={run}/elastic", *keys, f"out={tmp_path}/own")
    assert theirs["loss"] == pytest.approx(own["loss"], abs=1e-5)


def test_pipeline(ours):
    run, rows = ours
    result = pretrain(run, "--flextron-checkpoint", f"{run}/sorted", "--pipeline-model-parallel-size", "2", processes=2)
    assert_equal(losses(result), expected(rows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ffn-hidden-size", "128"], "its ffn_hidden_size is 64, the arguments say 128"),
        (["--spec", "flextron_mcore.specs", "elastic_layer"], "--spec: its space is not that of"),
    ],
)
def test_bad_input_is_one_line(ours, arguments, message):
    run, _ = ours
    result = pretrain(run, "--flextron-checkpoint", f"{run}/sorted", *arguments)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode and len(lines) == 1 and message in lines[0], result.stderr
