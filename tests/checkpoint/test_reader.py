"""Reading checkpoints, tensor by tensor and into a model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from megatron.core import dist_checkpointing

from flextron_mcore.checkpoint.reader import TensorReader, load_model
from flextron_mcore.checkpoint.store import CheckpointInfo, iteration_path, open_checkpoint, write_info
from flextron_mcore.config import FlextronError
from flextron_mcore.model import build_model
from tests import toy
from tests.checkpoint.cases import CASES, case, stream


@pytest.mark.parametrize("name", CASES)
def test_reader_and_model_get_the_stored_tensors(name, tmp_path):
    arch, space, model = case(name)
    info = stream(model, CheckpointInfo(arch, space, step=7, sorted=True), tmp_path / "run")
    assert (info.model, info.space, info.step, info.sorted) == (arch, space, 7, True)
    reader, expected = TensorReader(info), toy.memory_names(model)
    assert set(reader.keys()) == expected.keys()
    for key, tensor in expected.items():
        assert reader.shape(key) == tuple(tensor.shape) and torch.equal(reader.read(key), tensor)
    again = build_model(arch, space, initialize=False)
    load_model(again, info)
    for (key, p), q in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q), key
    half = build_model(arch, space, precision="bf16", initialize=False)
    load_model(half, info)
    assert torch.equal(half.embedding.word_embeddings.weight, model.embedding.word_embeddings.weight.bfloat16())


def test_modulation_is_read_or_added(tmp_path):
    arch, space, model = case("gpt2")
    names = {f"decoder.layers.{i}.{block}.modulation" for i in range(2) for block in ("self_attention", "mlp")}
    info = stream(model, CheckpointInfo(arch, space), tmp_path / "with")
    assert {name for name in TensorReader(info).keys() if name.endswith("modulation")} == names and info.space.modulation
    plain = replace(space, modulation=False)
    before = toy.model(arch, plain)
    info = stream(before, CheckpointInfo(arch, plain), tmp_path / "without")
    assert not info.space.modulation and "modulation" not in (info.path / "flextron.json").read_text()
    again = build_model(arch, space, initialize=False)
    load_model(again, replace(info, space=space))
    state = again.state_dict()
    assert not any(state[name].any() for name in names)
    assert all(torch.equal(state[name], value) for name, value in before.state_dict().items() if value is not None)


def test_the_reader_maps_what_is_alone_in_its_file_and_reads_any_other(tmp_path):
    arch, space, model = case("llama")
    info, expected = stream(model, CheckpointInfo(arch, space), tmp_path / "run"), toy.memory_names(model)
    own = iteration_path(tmp_path / "own", 0)
    own.mkdir(parents=True)
    dist_checkpointing.save(model.sharded_state_dict(metadata={"non_homogeneous_layers": True}), str(own))
    write_info(own, info)
    alone, together = TensorReader(info), TensorReader(open_checkpoint(own))
    for key, tensor in expected.items():
        assert alone._mapped(key) is not None and together._mapped(key) is None
        assert torch.equal(alone.read(key), tensor) and torch.equal(together.read(key), tensor)
        part = alone.read(key, units=2)
        assert torch.equal(part, together.read(key, units=2))
        if "fc1.weight" in key:  # gate and up projections
            part, tensor = (stacked.unflatten(0, (2, -1)) for stacked in (part, tensor))
        assert torch.equal(part, tensor[tuple(map(slice, part.shape))])
        assert (part.numel() < tensor.numel()) == key.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))


def test_a_file_with_another_tensor_is_damaged(tmp_path):
    arch, space, model = case("llama")
    reader = TensorReader(stream(model, CheckpointInfo(arch, space), tmp_path / "run"))
    key = "embedding.word_embeddings.weight"
    (place,) = [entry for index, entry in reader._reader.read_metadata().storage_data.items() if index.fqn == key]
    file = reader.info.path / place.relative_path
    size = file.stat().st_size
    torch.save(torch.load(file).T.contiguous(), file.open("wb"))
    assert file.stat().st_size == size
    with pytest.raises(
        FlextronError, match=r"tensor embedding.* cannot be read: .* damaged \(.*distcp holds \(32, 67\)"
    ) as error:
        reader.read(key)
    assert "\n" not in str(error.value)


def test_damaged_checkpoints_are_named(tmp_path):
    arch, space, model = case("llama")
    info = stream(model, CheckpointInfo(arch, space), tmp_path / "run")
    data = info.path / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(FlextronError, match=r"__0_0.distcp is truncated: \d+ bytes, but .metadata describes more: bring it back"):
        TensorReader(info)
    data.write_bytes(b"x" * len(content))
    with pytest.raises(FlextronError, match=r"iter_0000000: tensor .* cannot be read: the checkpoint is damaged") as error:
        reader = TensorReader(info)
        [reader.read(key) for key in reader.keys()]
    assert "\n" not in str(error.value)
    with pytest.raises(FlextronError, match=r"iter_0000000: cannot be loaded, damaged or of another model") as error:
        load_model(build_model(arch, space), info)
    assert "\n" not in str(error.value)
    (info.path / ".metadata").write_bytes(b"")
    with pytest.raises(FlextronError, match=r".metadata is damaged, or not a checkpoint's: ends too early"):
        TensorReader(info)
    (info.path / "flextron.json").write_text('{"format": 1}')
    with pytest.raises(FlextronError, match=r"flextron.json: not a checkpoint description \(lacks 'model'\)"):
        open_checkpoint(info.path)
    (info.path / "flextron.json").write_text(json.dumps({**info.to_dict(), "format": 99}))
    with pytest.raises(FlextronError, match=r"flextron.json: format 99 is not 1"):
        open_checkpoint(info.path)
