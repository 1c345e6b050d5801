"""Commands in the guides: the command line's own parser accepts each. Nothing is run here.

Other tests run some of them: `flextron launch` (tests/launch/test_guide.py), README's chain (tests/stages/test_readme.py),
`flextron quickstart` (tests/parallel/test_stages.py), `examples/chain.sh` and `examples/tour.py` (tests/test_examples.py).
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from flextron_mcore.settings.compose import compose
from flextron_mcore.settings.stages import STAGES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def lines(page: Path) -> list[str]:
    """Lines of the code blocks of a page; continued lines are joined."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [line.strip() for block in re.findall(r"^```[a-z]*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]


def commands(program: str) -> list:
    """(page, words after the program) of every line that starts with it, also behind torchrun."""
    found = []
    for page in PAGES:
        for line in lines(page):
            line = re.sub(r"^(?:OMP_NUM_THREADS=1 |torchrun .*? -m |\. \S+ && )+", "", line)
            if re.match(rf"{program}\s", line) and "$" not in line and "..." not in line:
                words = shlex.split(line, comments=True)[len(program.split()) :]
                found.append(pytest.param(words, id=f"{page.relative_to(ROOT)}: {shlex.join(words)[:60]}"))
    return found


@pytest.mark.parametrize("words", commands("flextron") + commands("flextron_mcore"))
def test_a_command_is_parsed(words):
    stage, *keys = words
    assert stage in STAGES
    folders = [key.partition("=")[2] for key in keys if key.startswith("--config-dir")]
    assert not folders, "needs a directory of the user's: write it in a sentence"
    compose(stage, keys)


@pytest.mark.parametrize("words", commands("make"))
def test_a_target_exists(words):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        if "=" in word or word == "&&":
            break
        assert re.search(rf"^{word}:", makefile, re.M), word


@pytest.mark.parametrize("words", commands("python"))
def test_a_python_program_exists(words):
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), words[1]
    else:
        assert (ROOT / words[0]).is_file(), words[0]


def test_enough_commands_are_found():
    assert len(commands("flextron")) > 60
