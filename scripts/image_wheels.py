#!/usr/bin/env python3
"""Wheels of this package and of what it needs beyond what this Python has: `image_wheels.py SOURCE OUT`, for the Dockerfile.

What is installed stays at its version: a container's own builds of PyTorch, Transformer Engine and apex are the reason to use it.
What is missing gets the version of constraints.txt, which the tests run with, unless PIP_CONSTRAINT says something about it.
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

from pip._vendor.packaging.version import InvalidVersion, Version  # pip is there wherever this runs, packaging may not be

PACKAGE = "flextron-mcore"


def canonical(name: str) -> str:
    """A package's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def named(line: str) -> str:
    """The package that a line of a constraints file is about, "" for none."""
    return canonical(re.match(r"[A-Za-z0-9._-]*", line)[0])


def installed() -> dict[str, str]:
    """{package: version} of this Python; without what a distribution gave a version that is none."""
    found = {}
    for distribution in importlib.metadata.distributions():
        try:
            name = canonical(distribution.metadata["Name"])
            found.setdefault(name, str(Version(distribution.version)))  # the first on the path is the one that is imported
        except (InvalidVersion, TypeError):
            continue
    return found


def constraints(has: Mapping[str, str], site: Iterable[str], ours: Iterable[str]) -> list[str]:
    """Lines of one constraints file: what is installed as it is, else what the site's file says, else ours."""
    kept = {name: f"{name}=={version}" for name, version in has.items()}
    first = [line.strip() for line in site if named(line) and named(line) not in kept]
    second = [line.strip() for line in ours if named(line) and named(line) not in kept.keys() | {named(line) for line in first}]
    return [*kept.values(), *first, *second]


def pip(*arguments: str) -> str:
    """Run pip; its standard output. Ends the program where pip fails, whose own words are on standard error."""
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    command = [sys.executable, "-m", "pip", *arguments]
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(f"image_wheels: pip {arguments[0]} failed: see above; conflicting versions can be relaxed in constraints.txt")
    return result.stdout


def main(source: Path, out: Path) -> None:
    """Write the wheels of `source` and of what it needs into `out`."""
    has = installed()
    site = [line for file in os.environ.get("PIP_CONSTRAINT", "").split() for line in Path(file).read_text().splitlines()]
    ours = (source / "constraints.txt").read_text().splitlines()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "constraints.txt"
        file.write_text("\n".join(constraints(has, site, ours)) + "\n")
        options = ["--quiet", "--no-cache-dir", "--constraint", str(file)]
        report = json.loads(pip("install", *options, "--dry-run", "--report", "-", str(source)))
        wanted = {canonical(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}
        del wanted[PACKAGE]  # from the source
        if replaced := sorted(wanted.keys() & has.keys()):
            sys.exit(f"image_wheels: would replace what the base image has: {', '.join(replaced)}")
        pins = [f"{name}=={version}" for name, version in sorted(wanted.items())]
        pip("wheel", "--quiet", "--no-cache-dir", "--no-deps", "--wheel-dir", str(out), str(source), *pins)
    print("\n".join(["wheels:", *pins]))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: image_wheels.py SOURCE OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
