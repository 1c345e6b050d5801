"""Adaptive routers in a checkpoint's directory."""

from __future__ import annotations

import pytest

from flextron_mcore.adaptive.routers import AdaptiveRouters
from flextron_mcore.adaptive.store import AdaptiveInfo, read_adaptive_routers
from flextron_mcore.config import FlextronError
from flextron_mcore.routers.static import StaticRouters
from flextron_mcore.routers.store import RouterInfo, kind_of_routers, read_routers, write_routers
from tests.routing_toy import family

BLOCKS = family(2)
SHARED = ("latency", "memory"), ((0.5, 1.0), (0.4, 0.9)), 8, {"dtype": "bf16", "batch_size": 1, "length": 24}


def test_adaptive_routers_hold_the_static_ones(tmp_path):
    routers = AdaptiveRouters(BLOCKS, 2, 8, StaticRouters(BLOCKS, 2, 16))
    described = AdaptiveInfo(*SHARED, kv_policy="own", calibration=((0.0, 0.5), (1.0, 0.9)))
    write_routers(tmp_path, described, routers, None)
    info, again = read_adaptive_routers(tmp_path, BLOCKS)
    assert info == described and again.out_NKU.equal(routers.out_NKU) and kind_of_routers(tmp_path) == "adaptive"
    info, static = read_routers(tmp_path, BLOCKS)
    assert (info.kind, info.hidden_size) == ("static", 16) and static.out_NKU.equal(routers.static.out_NKU)


def test_static_routers_are_not_read_as_adaptive_ones(tmp_path):
    write_routers(tmp_path, RouterInfo(*SHARED), StaticRouters(BLOCKS, 2, 8), None)
    with pytest.raises(FlextronError, match="its routers are static: train adaptive ones with `flextron router kind=adaptive`"):
        read_adaptive_routers(tmp_path, BLOCKS)


def test_an_unknown_kv_policy_in_the_file_is_named(tmp_path):
    routers = AdaptiveRouters(BLOCKS, 2, 8, StaticRouters(BLOCKS, 2, 16))
    write_routers(tmp_path, AdaptiveInfo(*SHARED, kv_policy="some"), routers, None)
    with pytest.raises(FlextronError, match=r"routers.json: .*kv_policy='some': use one of full, own"):
        read_adaptive_routers(tmp_path, BLOCKS)
