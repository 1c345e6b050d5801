"""Adaptive routers in a checkpoint's directory: the files of routers/store.py, which also hold the static routers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flextron_mcore.adaptive.routers import AdaptiveRouters
from flextron_mcore.choices import Choices
from flextron_mcore.config import FlextronError
from flextron_mcore.routers.static import StaticRouters
from flextron_mcore.routers.store import RouterInfo, opened_routers, static_part
from flextron_mcore.settings.sections import KV_POLICIES


@dataclass(frozen=True)
class AdaptiveInfo(RouterInfo):
    """Description of trained adaptive routers: fields of RouterInfo, KV policy and calibration.

    Attributes:
        kind: "adaptive".
        kv_policy: keys and values that a token wrote in training: `full`: of all KV groups, `own`: of those it used.
        calibration: points (target, average cost as a share of the full model's cost) of the first cost, evaluated on training
            data. A target is 0 for the smallest network's cost, 1 for the full model's.
    """

    kind: str = "adaptive"
    kv_policy: str = "full"
    calibration: tuple[tuple[float, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types, the content of routers.json."""
        return {**super().to_dict(), "kv_policy": self.kv_policy, "calibration": [list(pair) for pair in self.calibration]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdaptiveInfo:
        """Build from the plain types of `to_dict`. Raises ValueError for an unknown kv_policy."""
        if values["kv_policy"] not in KV_POLICIES:
            raise ValueError(f"kv_policy={values['kv_policy']!r}: use one of {', '.join(KV_POLICIES)}")
        calibration = tuple((float(target), float(share)) for target, share in values["calibration"])
        return replace(super().from_dict(values), kv_policy=values["kv_policy"], calibration=calibration)


def read_adaptive_routers(folder: Path, choices: Choices) -> tuple[AdaptiveInfo, AdaptiveRouters]:
    """Read the adaptive routers of the checkpoint in `folder`. Raises FlextronError if there are none or they are damaged."""
    with opened_routers(folder) as (values, weights):
        if values["kind"] != "adaptive":
            raise FlextronError(
                f"checkpoint={folder}: its routers are {values['kind']}: train adaptive ones with `flextron router kind=adaptive`"
            )
        info, static = AdaptiveInfo.from_dict(values), static_part(weights)
        start = StaticRouters(choices, len(info.costs), static["shift_NU"].shape[-1])
        routers = AdaptiveRouters(choices, len(info.costs), info.hidden_size, start)
        routers.load_state_dict(weights)
    return info, routers
