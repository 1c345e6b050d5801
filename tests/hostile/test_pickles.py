"""No pickle in a checkpoint, run or cache runs code, whatever command opens it."""

from __future__ import annotations

import os
import pickle
import re

import numpy as np
import pytest
import torch

from flextron_mcore.checkpoint.reader import TensorReader
from flextron_mcore.checkpoint.store import open_checkpoint, write_info
from flextron_mcore.checkpoint.unpickling import read_metadata
from flextron_mcore.config import FlextronError
from flextron_mcore.exports.formats import FORMATS
from flextron_mcore.routers.store import load_state
from tests.hostile.conftest import Copy, refusal, stage
from tests.hostile.payloads import Evil, calls, saved, spoil_metadata, spoil_objects

TRAIN = ["trainer.max_steps=1", "model.micro_batch_size=1", "model.global_batch_size=1", "trainer.limit_val_batches=1"]
# {stage: its keys}, for stages that read weights of a checkpoint
READERS = {
    "importance": ["data", "samples=2"],
    "elastic": ["data", *TRAIN],
    "router": ["data", *TRAIN],
    "gumbel": ["data", *TRAIN],
    "sensitivity": ["data"],
    "compare": ["data"],
    "evaluate": ["data"],
    "generate": ["prompt=x", "max_new_tokens=4"],
    "latency": [],
    **{f"export {name}": [f"format={name}"] for name in FORMATS},
}


def keys(copy: Copy, name: str) -> list[str]:
    """Stage, then keys, of an entry of READERS."""
    given = [f"data={copy.root}/data" if key == "data" else key for key in READERS[name]]
    out = [] if name == "generate" else [f"out={copy.root}/out"]
    return [name.split()[0], f"checkpoint={copy.root}/run", *given, *out]


@pytest.mark.parametrize("name", READERS)
def test_metadata(copy, name):
    spoil_metadata(copy.checkpoint, calls(copy.marker)["os.system"])
    copy.describe()
    assert re.search(r"\.metadata is damaged, or not a checkpoint's: it asks for \w+.system", refusal(*keys(copy, name)))
    assert not copy.marker.exists() and not (copy.root / "out").exists()


@pytest.mark.parametrize("name", [name for name in READERS if not name.startswith("export")])
def test_objects(copy, name):
    """Megatron-Core reads the extra states of a checkpoint; a pickled class in them is not loaded."""
    spoil_objects(copy.checkpoint, calls(copy.marker)["os.system"])
    copy.describe()
    assert "cannot be loaded, damaged or of another model (an object in it is not plain data)" in refusal(*keys(copy, name))
    assert not copy.marker.exists()


@pytest.mark.parametrize("spoil", [spoil_metadata, spoil_objects])
def test_a_checkpoint_with_routers(copy, spoil):
    """A checkpoint with routers, from which only `joint` continues, runs no pickle either."""
    stage(*keys(copy, "router"), "candidate_samples=0")
    routed = open_checkpoint(copy.root / "out")
    assert routed.path
    spoil(routed.path, calls(copy.marker)["os.system"])
    (routed.path / "flextron.json").unlink()
    write_info(routed.path, routed)
    said = refusal("joint", f"checkpoint={copy.root}/out", f"data={copy.root}/data", *TRAIN, f"out={copy.root}/joint")
    assert re.search(r"it asks for \w+.system|an object in it is not plain data", said)
    assert not copy.marker.exists()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("way", ["os.system", "eval", "open", "path", "torch.load"])
def test_every_way_to_call(copy, way, inside):
    evil = calls(copy.marker)[way]
    spoil_metadata(copy.checkpoint, evil, inside)
    with pytest.raises(FlextronError, match="metadata is damaged, or not a checkpoint's: it asks for"):
        read_metadata(copy.checkpoint)
    assert not copy.marker.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04",
        pickle.dumps([1, 2, 3]),
        b"\x80\x02]r\xff\xff\xff\xff.",  # a list with the number 2**32 - 1
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n}S'x'\nI1\nsb.",  # changes the class
        b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a text of 2**63 bytes
        b"(" * 10000 + b"t" * 10000 + b".",
    ],
)
def test_damaged_metadata(copy, data):
    (copy.checkpoint / ".metadata").write_bytes(data)
    with pytest.raises(FlextronError, match="metadata is damaged, or not a checkpoint's: .*: bring it back from a copy"):
        read_metadata(copy.checkpoint)


def test_metadata_that_lies(copy):
    """Sizes and places that the files do not have, and files elsewhere, are refused before memory is taken for them."""
    file = copy.checkpoint / ".metadata"
    good = file.read_bytes()

    def fails(change, words: str) -> None:
        found = pickle.loads(good)
        name = "decoder.final_layernorm.weight"
        change(found.state_dict_metadata[name], next(v for k, v in found.storage_data.items() if k.fqn == name), found)
        file.write_bytes(pickle.dumps(found))
        with pytest.raises(FlextronError, match=words):
            TensorReader(copy.info.at_step(0).__class__(**{**vars(copy.info), "path": copy.checkpoint}))

    huge = torch.Size([2**40])
    fails(lambda tensor, place, found: setattr(tensor, "size", huge), "has 32 stored elements, not 1099511627776")
    fails(lambda tensor, place, found: setattr(tensor.chunks[0], "sizes", huge), "final_layernorm.weight is larger than its file")
    fails(lambda tensor, place, found: setattr(place, "length", 2**40), "is truncated: .* bytes, but .metadata describes more")
    fails(lambda tensor, place, found: setattr(place, "offset", -1), "is truncated: .* bytes, but .metadata describes more")
    fails(lambda tensor, place, found: setattr(place, "relative_path", "../../net.json"), "which is not inside its directory")
    fails(lambda tensor, place, found: setattr(place, "relative_path", "/etc/passwd"), "which is not inside its directory")
    fails(lambda tensor, place, found: setattr(place, "transform_descriptors", ["zstd"]), "is compressed")
    fails(lambda tensor, place, found: setattr(found, "storage_data", None), "it holds no description of tensors")


def test_weights(copy):
    """A file of weights that pickles a class is refused, and the class is not made."""
    for file in copy.checkpoint.glob("*.distcp"):
        size = file.stat().st_size
        file.write_bytes(saved(calls(copy.marker)["os.system"]).ljust(size, b"\0")[:size])
    copy.describe()
    for name in ("evaluate", "export hf"):
        refusal(*keys(copy, name))
    assert not copy.marker.exists()


def test_common_state(copy):
    for name in ("common.pt", "metadata.json"):
        (copy.checkpoint / name).write_bytes(saved(calls(copy.marker)["os.system"]))
    copy.describe()
    assert "cannot be loaded, damaged" in refusal(*keys(copy, "evaluate"))
    assert not copy.marker.exists()


def test_environment_that_allows_pickles(copy, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    test_common_state(copy)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1" and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_state_of_routers(copy, tmp_path):
    (tmp_path / "router_training.pt").write_bytes(saved(calls(copy.marker)["os.system"]))
    with pytest.raises(FlextronError, match="cannot be resumed from"):
        load_state(tmp_path / "router_training.pt")
    assert not copy.marker.exists()


def test_indices_of_samples(copy):
    """Megatron-Core reads its cached indices with allow_pickle: those that hold objects are computed again."""
    command = [*keys(copy, "elastic")]
    stage(*command)
    (copy.root / "out" / "metrics.json").unlink()
    hostile = np.empty(1, dtype=object)
    hostile[0] = Evil(os.system, f"touch {copy.marker}")
    caches = list((copy.root / "out" / "cache").rglob("*.npy"))
    for file in caches:
        np.save(file, hostile, allow_pickle=True)
    stage(*command)
    assert caches and not copy.marker.exists()
