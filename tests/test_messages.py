"""Messages of the package: what they advise can be typed, and every refusal is quoted by a test that provokes it.

tests/messages.py reads the texts from the source. A fixture of tests/conftest.py also checks every refusal that any test
provokes, with the values of that run and for the stage that refuses.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.messages import HOLE, PROVOKED, SITES, Site, never_provoked

QUOTE = 10  # a test quotes a message by so many of its characters in a row, which other messages may share


def site(text: str, file: str = "axes.py") -> Site:
    return Site(file, 1, "FlextronError", text)


@pytest.mark.parametrize("file", sorted({file for file, _ in SITES}))
def test_messages_name_keys_and_commands_that_exist(file):
    faults = {str(site): found for site in SITES.values() if site.file == file and (found := site.faults())}
    assert not faults


@pytest.mark.parametrize(
    "text",
    [
        "run `flextron sensitivty` again",
        "train with `flextron router knd=adaptive`",
        "train with `flextron router kind=adaptve`",
        "checkpoint={}: cannot be read; set overwite=true",
        "checkpoint={}: is of another model; set selector=uniform and modulation=true",  # its keys belong to different stages
        f"kind={HOLE}: is not known: use kind=dynamic",
        "lower model.optim.lrr",
    ],
)
def test_a_remedy_that_is_refused_is_a_fault(text):
    assert site(text).faults()


def test_a_remedy_is_one_of_the_stage_that_refuses():
    text = "selector=random: evaluates networks: give data="
    assert not site(text).faults("select") and site(text).faults("generate")
    assert not site(text, "stages/select.py").faults() and site(text, "stages/generate.py").faults()


def test_launch_takes_keys_of_its_stages():
    text = f"{HOLE}: needs more memory: raise {HOLE}.model.tensor_model_parallel_size"
    place = site(text, "launch/resources.py")
    assert not place.faults("launch", "elastic: needs more memory: raise elastic.model.tensor_model_parallel_size")
    assert place.faults("launch", "latency: needs more memory: raise latency.model.tensor_model_parallel_size")


def runs(text: str) -> set[str]:
    """All parts of QUOTE characters of a text that do not reach over a hole."""
    return {part[i : i + QUOTE] for part in text.split(HOLE) for i in range(len(part) - QUOTE + 1)}


def quoted() -> Iterator[str]:
    """Texts in the code of all other tests, without docstrings; of regular expressions without backslashes."""
    for file in Path(__file__).parent.rglob("*.py"):
        if file.stem.endswith("messages"):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield node.value.replace("\\", "")


def test_every_refusal_is_quoted_by_a_test():
    """Every refusal is quoted by a test. Those without QUOTE characters of their own, which pass on other texts, are left out."""
    found = set().union(*map(runs, quoted()))
    refusals = [site for site in SITES.values() if site.kind == "FlextronError" and runs(site.text)]
    assert not [str(site) for site in refusals if not runs(site.text) & found]


def test_refusals_of_other_processes_are_noted(tmp_path):
    note = tmp_path / "provoked"
    path = os.pathsep.join(filter(None, [str(PROVOKED), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "FLEXTRON_MESSAGES": str(note), "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-m", "flextron_mcore", "elastic"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "elastic: missing checkpoint=" in done.stderr
    missing = {site.file for site in never_provoked(note)}
    [provoked] = [site for site in SITES.values() if site.kind == "FlextronError" and site not in never_provoked(note)]
    assert provoked.file == "settings/compose.py" and provoked.text.startswith(f"{HOLE}: missing") and "cost.py" in missing
