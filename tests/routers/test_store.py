"""Routers and their training state in a checkpoint's directory."""

from __future__ import annotations

import json

import pytest
import torch

from flextron_mcore.config import FlextronError
from flextron_mcore.digests import read_description
from flextron_mcore.routers.static import StaticRouters
from flextron_mcore.routers.store import RouterInfo, load_state, read_routers, save_state, write_routers
from tests.routing_toy import family

BLOCKS = family(2)
INFO = RouterInfo(("latency", "memory"), ((0.5, 1.0), (0.4, 0.9)), 8, {"dtype": "bf16", "batch_size": 1, "length": 24})


def test_routers_are_read_back(tmp_path):
    routers = StaticRouters(BLOCKS, 2, 8)
    write_routers(tmp_path, INFO, routers, {"a": 1})
    info, again = read_routers(tmp_path, BLOCKS)
    assert info == INFO and read_description(tmp_path / "latency.json") == {"a": 1}
    targets = torch.rand(3, 2)
    assert again(targets).equal(routers(targets))


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda p: (p / "routers.json").unlink(),
            "has no routers: train them with `flextron router`, or choose another selector",
        ),
        (lambda p: (p / "routers.json").write_text("{"), "routers.json: the routers cannot be read"),
        (lambda p: (p / "routers.safetensors").write_bytes(b"x"), "routers.json: the routers cannot be read"),
        (lambda p: (p / "routers.safetensors").unlink(), "routers.json: the routers cannot be read"),
        (
            lambda p: (p / "routers.json").write_text(json.dumps({**INFO.to_dict(), "kind": "psychic"})),
            "routers of format 1, kind 'psychic' are not known here",
        ),
    ],
)
def test_unreadable_routers_are_refused(tmp_path, damage, message):
    write_routers(tmp_path, INFO, StaticRouters(BLOCKS, 2, 8), None)
    damage(tmp_path)
    with pytest.raises(FlextronError, match=message) as error:
        read_routers(tmp_path, BLOCKS)
    assert "\n" not in str(error.value)


def test_routers_of_another_space_are_refused(tmp_path):
    write_routers(tmp_path, INFO, StaticRouters(family(3), 2, 8), None)
    with pytest.raises(FlextronError, match="the routers cannot be read"):
        read_routers(tmp_path, BLOCKS)


def test_the_training_state_is_read_back(tmp_path):
    layer = torch.nn.Linear(2, 2)
    save_state(tmp_path / "s.pt", layer=layer, seen={"losses": torch.ones(3)}, error=0.5)
    state = load_state(tmp_path / "s.pt")
    assert state["layer"]["weight"].equal(layer.weight) and state["error"] == 0.5 and state["seen"]["losses"].sum() == 3
    (tmp_path / "s.pt").write_bytes(b"")
    with pytest.raises(FlextronError, match=r"s.pt: cannot be resumed from"):
        load_state(tmp_path / "s.pt")
