"""Pages name files that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
# Folders below the package, and those beside it.
PLACES = (ROOT / "flextron_mcore", ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page):
    rooms = {folder.name for place in PLACES for folder in place.iterdir() if folder.is_dir()}
    named = set(re.findall(r"`([\w/]+/[\w.]+\.(?:py|yaml|sh|sbatch))\b", page.read_text(encoding="utf-8")))
    missing = [name for name in named if name.split("/")[0] in rooms and not any((place / name).is_file() for place in PLACES)]
    assert not missing


def test_rooms_of_the_design_page_exist():
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.+?) \|", text[: text.index("### Where to find")], re.M)
    named = re.findall(r"`([\w.]+)/?`", " ".join(rows))
    have = {
        path.name for path in PLACES[0].iterdir() if (path.is_dir() or path.suffix == ".py") and not path.name.startswith("__")
    }
    assert set(named) == have
