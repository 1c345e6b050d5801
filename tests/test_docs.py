"""Pages stay short, name files, functions and places that exist, and results say how they were made."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "flextron_mcore"
GUIDES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "keys.md")
RESULTS = sorted((ROOT / "docs/results").glob("*.md"))
TOP = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES = [*GUIDES, *RESULTS, *TOP]
# Roots that a path in a page may be relative to.
PLACES = (PACKAGE, ROOT)


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)
    titles = [re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def defined(file: Path) -> set[str]:
    """Functions, classes and constants of a Python file."""
    found = set()
    for node in ast.parse(read(file)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_exist(page):
    rooms = {folder.name for place in PLACES for folder in place.iterdir() if folder.is_dir()}
    named = set(re.findall(r"`([\w/]+/[\w.]+\.(?:py|yaml|sh|sbatch))\b", read(page)))
    named = {file for file in named if "NAME" not in file and file.split("/")[0] in rooms}
    missing = [file for file in named if not any((place / file).is_file() for place in PLACES)]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    broken = []
    text = re.sub(r"^```.*?^```|`[^`\n]*`", "", read(page), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_guides_are_short():
    words = {page.name: len(read(page).split()) for page in GUIDES}
    assert not {page: count for page, count in words.items() if count > 1000}
    assert sum(words.values()) <= 12_000
    assert len(read(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", [page for page in RESULTS if page.name != "README.md"], ids=name)
def test_a_result_says_how_it_was_made(page):
    text = read(page)
    rows = re.findall(r"^\| \*\*(.+?)\*\* \| (.+) \|$", text, re.M)
    assert [name for name, _ in rows[:5]] == ["Question", "Command", "Machine", "Date", "Does not show"]
    question, command, _, date, _ = (value for _, value in rows[:5])
    assert question.endswith("?") and "`" in command and re.search(r"\d{4}-\d\d-\d\d", date)
    assert len(re.findall(r"^\|[-| ]+\|$", text, re.M)) > 1, "no table beside the first"


def test_every_page_is_in_an_index():
    for folder in ("docs", "docs/results"):
        index = read(ROOT / folder / "README.md")
        for page in (ROOT / folder).glob("*.md"):
            assert page.name == "README.md" or f"({page.name}" in index, page.name


def test_functions_and_tests_of_the_method_page_exist():
    named = re.findall(r"`((?:\w+/)*\w+\.py)(?::(\w+))?`", read(ROOT / "docs/method.md"))
    assert len(named) > 40
    for path, symbol in named:
        file = next(place / path for place in PLACES if (place / path).is_file())
        assert not symbol or symbol in defined(file), f"{path}:{symbol}"


def test_messages_of_the_page_of_failures_exist():
    """Each part of a message in the first column of failures.md, between its gaps, stands in the package's sources."""
    nodes = [node for file in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(read(file)))]
    written = "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    cells = re.findall(r"^\| (.*?`.+?`.*?) \|", read(ROOT / "docs/failures.md"), re.M)
    # FAILED is a state of Slurm. `values` are parts of the examples that the source does not hold, because a run fills them in.
    quoted = [text for cell in cells for text in re.findall(r"`(.+?)`", cell) if not text.isupper()]
    values = r"\.\.\.|[\d')]+|\b(?:KEY|cluster\.account)=|\bdata\.json|\brunning\b"
    parts = [part.strip() for text in quoted for part in re.split(values, text)]
    assert len(cells) > 25 and not [part for part in parts if len(part) > 5 and part not in written]


def test_rooms_of_the_design_page_exist():
    text = read(ROOT / "docs/design.md")
    rows = re.findall(r"^\| (`.+?) \|", text[: text.index("### Where to find")], re.M)
    named = re.findall(r"`([\w.]+)/?`", " ".join(rows))
    have = {path.name for path in PACKAGE.iterdir() if (path.is_dir() or path.suffix == ".py") and not path.name.startswith("__")}
    assert set(named) == have


def test_names_in_the_lists_of_contributing_exist():
    """Each name in backticks is a word of the files that its item names, or of the package's sources."""
    text = read(ROOT / "CONTRIBUTING.md")
    items = re.split(r"^(?:\d\. |\*\*)", text[text.index("## Add a part") : text.index("## Documentation")], flags=re.M)[1:]
    everything = "\n".join(read(file) for file in PACKAGE.rglob("*.py"))
    checked = 0
    for item in items:
        quoted = re.findall(r"`([^`]+)`", item)
        files = [place / path for path in quoted for place in PLACES if path.endswith(".py") and (place / path).is_file()]
        named = [word for word in quoted if re.fullmatch(r"[A-Za-z_]\w*", word)]
        source = everything if "NAME" in item or not files else "\n".join(map(read, files))
        missing = [word for word in named if not re.search(rf"\b{word}\b", source)]
        assert not missing, f"{missing} in: {item}"
        checked += len(named)
    assert checked > 25
