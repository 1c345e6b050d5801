"""The wheel holds every file that the package reads; setup.py agrees with constraints.txt, the documents and the scripts."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd=ROOT):
    # Variables that an outer `make` sets, and with which an inner one would print more.
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that the checkout stays clean."""
    pytest.importorskip("setuptools")
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("flextron_mcore", "conf"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", ".", cwd=source)
    (path,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def requirements(wheel):
    """{name: requirement} of the wheel, without the extras."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    lines = message_from_string(wheel.read(name).decode()).get_all("Requires-Dist")
    found = [Requirement(line) for line in lines]
    return {r.name: r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})}


def files(folder):
    """Paths of all files below `folder`, relative to it."""
    return {p.relative_to(ROOT / folder).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix != ".pyc"}


def test_wheel_holds_the_whole_package(wheel):
    expected = {f"flextron_mcore/{path}" for path in files("flextron_mcore")}
    expected |= {f"flextron_mcore/conf/{path}" for path in files("conf")}
    assert not expected - set(wheel.namelist())


def test_wheel_holds_nothing_else(wheel):
    assert {name.split("/")[0].split("-")[0] for name in wheel.namelist()} == {"flextron_mcore"}


def test_wheel_installs_the_command(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "flextron = flextron_mcore.cli:main" in wheel.read(name).decode()


def test_version_is_the_package_version(wheel):
    import flextron_mcore

    assert f"flextron_mcore-{flextron_mcore.__version__}.dist-info/METADATA" in wheel.namelist()


@pytest.mark.parametrize("python_version", ["3.11", "3.12", "3.13"])
def test_constraints_pin_every_dependency_to_one_accepted_version(requirements, python_version):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python_version})]
    names = [pin.name for pin in pins]
    assert len(set(names)) == len(names)
    assert not requirements.keys() - set(names)
    for pin in pins:
        (specifier,) = pin.specifier
        assert specifier.operator == "==", pin
        if pin.name in requirements:
            assert requirements[pin.name].specifier.contains(specifier.version), pin


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_commands_in_the_documents_exist():
    listed = set(re.findall(r"^  make ([a-z-]+) ", run("make", "--no-print-directory"), re.M))
    assert {"setup", "quickstart", "test", "test-newest", "lint"} <= listed
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        blocks = re.findall(r"^```[^\n]*\n(.*?)^```", document.read_text() if document.exists() else "", re.M | re.S)
        used = {name for block in blocks for name in re.findall(r"^(?:\$ )?make ([a-z-]+)", block, re.M)}
        assert used <= listed, f"{document.name}: no such target: {used - listed}"


@pytest.mark.parametrize(
    "script",
    [
        "scripts/setup.sh",
        "scripts/test-newest.sh",
        "scripts/llama-cpp.sh",
        "scripts/build-image.sh",
        "scripts/docs.sh",
    ]
    + ["examples/slurm/elastic.sbatch", ".ci/run"],
)
def test_shell_scripts_are_executable_and_parse(script):
    assert os.access(ROOT / script, os.X_OK)
    run("bash", "-n", script)
