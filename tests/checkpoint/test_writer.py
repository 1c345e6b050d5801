"""Checkpoints written tensor by tensor: Megatron-Core's own format, whole or not there at all."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from flextron_mcore.checkpoint.store import CheckpointInfo
from flextron_mcore.checkpoint.writer import LazyTensor, share_out, write_torch_dist
from flextron_mcore.config import FlextronError
from flextron_mcore.digests import HashingFile
from flextron_mcore.model import gpt_model, transformer_config
from flextron_mcore.runtime.disk import plain_errors, write_aside
from flextron_mcore.space import ElasticSpace
from tests import toy
from tests.checkpoint.cases import CASES, case, stream


@pytest.mark.parametrize("name", CASES)
def test_streaming_is_megatron_cores_own_save(name, tmp_path):
    arch, space, model = case(name)
    info = stream(model, CheckpointInfo(arch, space), tmp_path / "streamed")
    own = tmp_path / "own"
    own.mkdir()
    dist_checkpointing.save(model.sharded_state_dict(metadata={"non_homogeneous_layers": True}), str(own))
    streamed = dist_checkpointing.load_plain_tensors(str(info.path))
    saved = dist_checkpointing.load_plain_tensors(str(own))
    tensors = {k: v for k, v in saved.items() if isinstance(v, torch.Tensor)}
    assert tensors.keys() == {k for k, v in streamed.items() if isinstance(v, torch.Tensor)}
    assert all(torch.equal(tensors[k], streamed[k]) for k in tensors)
    assert set(saved) - {"common_state/shard_0_1"} <= set(streamed) | {k for k in saved if k.startswith("common_state")}


def test_an_error_in_a_tensor_leaves_nothing(tmp_path):
    def fail() -> torch.Tensor:
        raise FlextronError("cannot be made")

    whole = LazyTensor((2,), torch.float32, lambda: torch.ones(2))
    with pytest.raises(FlextronError, match="cannot be made"), write_aside(tmp_path / "out") as aside:
        write_torch_dist(aside, {"a": whole, "b": replace(whole, load=fail), "c": whole})
    with (
        pytest.raises(FlextronError, match=r"tensor b: \(2,\) torch.float32 instead of \(3,\)"),
        write_aside(tmp_path / "out") as aside,
    ):
        write_torch_dist(aside, {"a": whole, "b": replace(whole, shape=(3,))})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("failing", range(6))
def test_an_error_in_any_thread_of_the_writer_is_raised_and_ends_the_others(failing, tmp_path):
    """An error in any thread of the writer is raised, and few tensors are computed after it."""
    made = []

    def load(i: int) -> torch.Tensor:
        made.append(i)
        if i == failing:
            raise FlextronError(f"tensor {i} cannot be made")
        return torch.ones(1 << 20)

    tensors = {f"{i:03}": LazyTensor((1 << 20,), torch.float32, partial(load, i)) for i in range(100)}
    with pytest.raises(FlextronError, match=f"^tensor {failing} cannot be made$"), write_aside(tmp_path / "out") as aside:
        write_torch_dist(aside, tensors)
    assert len(made) < 20
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_interruption_waits_for_the_thread_that_writes(tmp_path, monkeypatch):
    """An interruption waits for the other thread: the directory into which it writes is removed afterwards."""
    writing, close = [], HashingFile.close

    def slow_close(file: HashingFile) -> None:
        if threading.current_thread() is not threading.main_thread():
            writing.append(file)
            time.sleep(0.5)
            writing.pop()
        close(file)

    def interrupt(_: int) -> None:
        if writing and threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt

    monkeypatch.setattr(HashingFile, "close", slow_close)
    tensors = {str(i): LazyTensor((4,), torch.float32, lambda: torch.ones(4)) for i in range(500)}
    with pytest.raises(KeyboardInterrupt), plain_errors():
        write_torch_dist(tmp_path, tensors, progress=interrupt)
    assert not writing
    files = len(list(tmp_path.iterdir()))
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) == files < 500


@pytest.mark.parametrize("name", CASES)
def test_a_stock_model_loads_the_full_model(name, tmp_path):
    arch, space, model = case(name)
    info = stream(model, CheckpointInfo(arch, space), tmp_path / "run")
    config = transformer_config(arch)
    stock = gpt_model(arch, config, get_gpt_layer_local_spec(normalization=config.normalization)).eval()
    state = dist_checkpointing.load(stock.sharded_state_dict(metadata={"non_homogeneous_layers": True}), str(info.path))
    stock.load_state_dict(state)
    tokens, positions = toy.inputs()
    mask = torch.ones(toy.LENGTH, toy.LENGTH, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens, positions, mask), model(tokens, positions, None), atol=1e-5, rtol=0)


def test_a_full_disk_is_one_line_and_leaves_nothing(make_disk, monkeypatch):
    small_disk = make_disk("1m")
    arch = toy.config(ffn_hidden_size=4096)
    space = ElasticSpace.build(arch)
    model = toy.model(arch, space)
    keep = small_disk / "keep"
    keep.write_text("precious")
    with pytest.raises(FlextronError, match=r"cannot be written: .* needed, .* free; free space") as error:
        stream(model, CheckpointInfo(arch, space), small_disk / "run")
    assert "\n" not in str(error.value)
    # the disk fills up while the checkpoint is written
    monkeypatch.setattr("flextron_mcore.checkpoint.writer.check_space", lambda *args: None)
    with pytest.raises(FlextronError, match=r"run: cannot be written: No space left on device; nothing was changed") as error:
        stream(model, CheckpointInfo(arch, space), small_disk / "run")
    assert "\n" not in str(error.value)
    assert [p.name for p in small_disk.iterdir()] == ["keep"] and keep.read_text() == "precious"


def test_ranks_write_about_as_much_as_each_other():
    sizes = {"table": 60, **{f"weight {i}": 20 for i in range(6)}, **{f"bias {i}": 1 for i in range(6)}}
    shares = share_out(sizes, 3)
    assert sorted(name for share in shares for name in share) == sorted(sizes)
    assert [sum(sizes[name] for name in share) for share in shares] == [62, 62, 62]
    assert share_out(sizes, 1) == [set(sizes)]
    assert sum(map(len, share_out({"only": 1}, 4))) == 1
