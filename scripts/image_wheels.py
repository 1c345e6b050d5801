#!/usr/bin/env python3
"""Build wheels of this package and of its dependencies that this Python lacks: `image_wheels.py SOURCE OUT`, for the Dockerfile.

Installed packages keep their version, because a container's builds of PyTorch, Transformer Engine and apex are the reason to use
it. Missing ones get the version in the files of PIP_CONSTRAINT, else the tested version in constraints.txt.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from pip._vendor.packaging.version import InvalidVersion, Version  # from pip, because packaging may not be installed

PACKAGE = "flextron-mcore"


def canonical(name: str) -> str:
    """Normalized name of a package (PEP 503): lower case, runs of `-`, `_` and `.` as one hyphen."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named(line: str) -> str:
    """Package that a line of a constraints file names; empty for none."""
    return canonical(re.match(r"[A-Za-z0-9._-]*", line)[0])


def installed() -> dict[str, str]:
    """{package: version} of this Python, without packages of invalid version; of several copies the one that is imported."""
    found = {}
    for distribution in importlib.metadata.distributions():
        try:
            name = canonical(distribution.metadata["Name"])
            found.setdefault(name, str(Version(distribution.version)))  # the first on the path is imported
        except (InvalidVersion, TypeError):
            continue
    return found


def constraints(has: Mapping[str, str], site: Iterable[str], ours: Iterable[str]) -> list[str]:
    """Lines of a constraints file that takes each package's version from the first source that has it.

    Args:
        has: {package: version} that is installed; first choice.
        site: lines of the site's constraints; second choice.
        ours: lines of constraints.txt; last choice.
    """
    kept = {name: f"{name}=={version}" for name, version in has.items()}
    first = [line.strip() for line in site if named(line) and named(line) not in kept]
    second = [line.strip() for line in ours if named(line) and named(line) not in kept.keys() | {named(line) for line in first}]
    return [*kept.values(), *first, *second]


def pip(*arguments: str) -> str:
    """Run pip and return its standard output. Ends the program if pip fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    command = [sys.executable, "-m", "pip", *arguments]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"image_wheels: pip {arguments[0]} failed, see above: if versions conflict, relax them in constraints.txt")
    return result.stdout


def main(source: Path, out: Path) -> None:
    """Write wheels of `source` and of its missing dependencies into `out`."""
    has = installed()
    site = [line for file in os.environ.get("PIP_CONSTRAINT", "").split() for line in Path(file).read_text().splitlines()]
    ours = (source / "constraints.txt").read_text().splitlines()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "constraints.txt"
        file.write_text("\n".join(constraints(has, site, ours)) + "\n")
        options = ["--quiet", "--no-cache-dir", "--constraint", str(file)]
        report = json.loads(pip("install", *options, "--dry-run", "--report", "-", str(source)))
        wanted = {canonical(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}
        del wanted[PACKAGE]  # built from the source
        if replaced := sorted(wanted.keys() & has.keys()):
            sys.exit(f"image_wheels: would replace packages of the base image, which must stay: {', '.join(replaced)}")
        pins = [f"{name}=={version}" for name, version in sorted(wanted.items())]
        pip("wheel", "--quiet", "--no-cache-dir", "--no-deps", "--wheel-dir", str(out), str(source), *pins)
    print("\n".join(["wheels:", *pins]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: image_wheels.py SOURCE OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
