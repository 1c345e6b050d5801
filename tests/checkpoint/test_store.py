"""Checkpoints on disk: vanilla, whole or not there, readable tensor by tensor."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from flextron_mcore.checkpoint.reader import TensorReader, load_model
from flextron_mcore.checkpoint.store import CheckpointInfo, iteration_path, open_checkpoint, write_info
from flextron_mcore.checkpoint.writer import LazyTensor, share_out, write_torch_dist
from flextron_mcore.config import FlextronError
from flextron_mcore.model import build_model, gpt_model, transformer_config
from flextron_mcore.runtime.disk import write_aside, write_whole
from flextron_mcore.space import ElasticSpace
from tests import toy

CASES = {
    "llama": (toy.LLAMA, 4, "kv_group", 2),
    "gpt2": (toy.GPT2, 4, "kv_group", 4),
    "query heads": (toy.LLAMA, 2, "query_head", 4),
}


def case(name):
    kind, groups, unit, granularity = CASES[name]
    arch = toy.config(**kind, num_query_groups=groups)
    space = ElasticSpace.build(arch, granularity, unit, heads=[1.0], modulation=name == "gpt2")
    return arch, space, toy.model(arch, space)


def stream(model, info: CheckpointInfo, run: Path) -> CheckpointInfo:
    with write_aside(run) as aside:
        toy.write(model, info, aside)
    return open_checkpoint(run)


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


@pytest.mark.parametrize("name", CASES)
def test_reader_and_loading(name, tmp_path):
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


def test_modulation_is_added_and_its_names(tmp_path):
    arch, space, model = case("gpt2")
    names = [f"decoder.layers.{i}.{block}.modulation" for i in range(2) for block in ("self_attention", "mlp")]
    info = stream(model, CheckpointInfo(arch, space), tmp_path / "with")
    assert [name for name in TensorReader(info).keys() if name.endswith("modulation")] == names and info.space.modulation
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


def test_what_goes_wrong_while_the_next_tensor_is_made(tmp_path):
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


def test_what_is_not_a_whole_checkpoint(tmp_path):
    arch, space, model = case("llama")
    run = tmp_path / "run"
    info = stream(model, CheckpointInfo(arch, space), run)
    with pytest.raises(FlextronError, match="nowhere: no such directory"):
        open_checkpoint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FlextronError, match="empty: no checkpoint in it"):
        open_checkpoint(tmp_path / "empty")
    # one that is being written is passed over, and so is what has nothing to do with them
    (run / "checkpoints" / ".iter_0000009.tmp").mkdir()
    (run / "checkpoints" / "iter_0000008.bak").mkdir()
    (run / "checkpoints" / "iter_0000008").write_text("a file")
    (run / "checkpoints" / "latest.txt").write_text("iter_0000000")
    assert open_checkpoint(run) == info and open_checkpoint(info.path) == info and open_checkpoint(run / "checkpoints") == info


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


SPOILT = {
    "truncated": (".metadata", cut, r"\.metadata is truncated: \d+ bytes, not \d+"),
    "emptied": ("__0_3.distcp", lambda file: file.write_bytes(b""), r"__0_3\.distcp is truncated: 0 bytes, not \d+"),
    "grown": ("__0_0.distcp", lambda file: file.write_bytes(file.read_bytes() + b"x"), r"__0_0\.distcp is damaged: \d+ bytes"),
    "lost": ("common.pt", Path.unlink, r"common\.pt is missing"),
    "no description": ("flextron.json", Path.unlink, r"flextron\.json is missing"),
    "half a description": ("flextron.json", cut, r"flextron\.json is damaged: not a checkpoint description"),
    "another description": ("flextron.json", lambda file: file.write_text("[1]"), r"flextron\.json is damaged"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_damage_is_seen_when_opened_and_nothing_older_is_taken(name, tmp_path):
    arch, space, model = case("llama")
    run = tmp_path / "run"
    older, newest = (toy.write(model, CheckpointInfo(arch, space, step=step), run) for step in (7, 10_000_000))
    assert open_checkpoint(run).step == 10_000_000
    file, spoil, message = SPOILT[name]
    spoil(newest / file)
    for path in (run, newest):
        with pytest.raises(FlextronError, match=message + f".*; remove {newest} to continue from iter_0000007$") as error:
            open_checkpoint(path)
        assert "\n" not in str(error.value)
    assert open_checkpoint(older).step == 7
    spoil(older / file)
    with pytest.raises(FlextronError, match=message + ".*; no older checkpoint beside it is whole: bring it back"):
        open_checkpoint(run)


def test_sizes_are_recorded_and_not_asked_of_early_checkpoints(tmp_path):
    arch, space, model = case("llama")
    info = stream(model, CheckpointInfo(arch, space), tmp_path / "run")
    file = info.path / "flextron.json"
    values = json.loads(file.read_text())
    assert values.pop("files") == {p.name: p.stat().st_size for p in info.path.iterdir() if p != file}
    file.write_text(json.dumps(values))
    assert open_checkpoint(info.path) == info


def test_write_whole_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    write_whole(file, "old")
    write = Path.write_text

    def half(self, text, **options):
        write(self, text[:1], **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        write_whole(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_damaged_checkpoints_are_named(tmp_path):
    arch, space, model = case("llama")
    info = stream(model, CheckpointInfo(arch, space), tmp_path / "run")
    data = info.path / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(FlextronError, match=r"iter_0000000: tensor .* cannot be read: the checkpoint is damaged") as error:
        reader = TensorReader(info)
        [reader.read(key) for key in reader.keys()]
    assert "\n" not in str(error.value)
    with pytest.raises(FlextronError, match=r"iter_0000000: cannot be loaded, damaged or of another model") as error:
        load_model(build_model(arch, space), info)
    assert "\n" not in str(error.value)
    (info.path / ".metadata").write_bytes(b"")
    with pytest.raises(FlextronError, match=r".metadata is missing or damaged"):
        TensorReader(info)
    (info.path / "flextron.json").write_text('{"format": 1}')
    with pytest.raises(FlextronError, match=r"flextron.json: not a checkpoint description \(KeyError: 'model'\)"):
        open_checkpoint(info.path)
    (info.path / "flextron.json").write_text(json.dumps({**info.to_dict(), "format": 99}))
    with pytest.raises(FlextronError, match=r"flextron.json: format 99 is not 1"):
        open_checkpoint(info.path)


def test_write_aside_leaves_nothing_or_all(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(RuntimeError), write_aside(target) as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with write_aside(target) as folder:
        (folder / "whole").write_text("1")
    with write_aside(target) as folder:
        (folder / "whole").write_text("2")
    assert (target / "whole").read_text() == "2" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_full_disk(make_disk, monkeypatch):
    small_disk = make_disk("1m")
    arch = toy.config(ffn_hidden_size=4096)
    space = ElasticSpace.build(arch)
    model = toy.model(arch, space)
    keep = small_disk / "keep"
    keep.write_text("precious")
    with pytest.raises(FlextronError, match=r"cannot be written: .* GiB needed, .* GiB free; free space") as error:
        stream(model, CheckpointInfo(arch, space), small_disk / "run")
    assert "\n" not in str(error.value)
    # and when the space goes while writing
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
