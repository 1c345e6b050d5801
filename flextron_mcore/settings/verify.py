"""Schema of `flextron verify`. No torch import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flextron_mcore.settings.schema import MISSING, path, setting
from flextron_mcore.settings.training import StageSettings


@dataclass
class VerifySettings(StageSettings):
    """Compare files with the digests that were recorded when they were written: `flextron verify PATH`."""

    stage: ClassVar[str] = "verify"

    out: str | None = path(None, "not used: verify writes no result", role="output")
    path: str = path(MISSING, "directory that a stage wrote, a file in it, or a directory that holds several of them")
    accept: bool = setting(
        False, "true: record digests of the files as they are now, after a change of your own or for files of an earlier version"
    )
