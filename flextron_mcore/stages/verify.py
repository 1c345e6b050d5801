"""`flextron verify`: comparison of files with the digests that were recorded when they were written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flextron_mcore.config import FlextronError
from flextron_mcore.runs.output import claimed
from flextron_mcore.runs.terminal import say
from flextron_mcore.runs.verification import accept, verify
from flextron_mcore.runtime.disk import disk_errors
from flextron_mcore.runtime.ranks import is_main_process
from flextron_mcore.settings.stages import VerifySettings


def run(settings: VerifySettings) -> dict[str, Any]:
    """Compare all files below settings.path, or with accept=true record them as they are; only the main process works.

    Returns {"stage", "files" and "bytes": compared, "unlisted": files without a digest}; {} on other ranks. Raises FlextronError
    if a file is not as recorded.
    """
    if not is_main_process():
        return {}
    path = Path(settings.path)
    if settings.accept:
        with claimed(path), disk_errors(path):
            for fault in accept(path):
                say(f"accepted: {fault}")
    found = verify(path)
    for name in found.unlisted:
        say(f"without a digest: {name}")
    if found.faults:
        for fault in found.faults[1:]:
            say(fault)
        more = f" (and {len(found.faults) - 1} more)" if len(found.faults) > 1 else ""
        raise FlextronError(
            f"{found.faults[0]}{more}: bring it back from a copy, or, if the change is yours, record it with `flextron verify "
            f"path={path} accept=true`"
        )
    say(f"verify: {found.files} files, {found.bytes:,} bytes are as they were written")
    return {"stage": "verify", "files": found.files, "bytes": found.bytes, "unlisted": list(found.unlisted)}
