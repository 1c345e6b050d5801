"""Hooks of mkdocs, which add pages that are not files of docs/.

They are the public API, a page for each folder or module of the package (a room, docs/design.md), CONTRIBUTING, CHANGELOG and
SECURITY of the checkout, and the report of a quickstart, which scripts/quickstart_docs.py puts into docs/assets.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
TOP = ("CONTRIBUTING", "CHANGELOG", "SECURITY")  # pages from the root of the checkout
PACKAGE = ROOT / "flextron_mcore"
REPORT = """# Report of a quickstart

Made by `flextron report` at the end of `make quickstart`, on two CPU cores.
[Open it on its own](assets/report.html){target=_blank}.

<iframe src="assets/report.html" title="Report of a quickstart" class="report"></iframe>
"""
# Folders of code that is copied into exported directories and runs without the package: no API pages.
EXPORTED = {"code", "runtime", "flextron_trtllm"}


def on_config(config: Any) -> Any:
    pages = [f"rooms/{room}.md" for room in rooms()]
    for entry in config.nav:
        if "API" in entry:
            entry["API"] = ["api.md", *pages]
        if "Begin" in entry:
            entry["Begin"] = [*entry["Begin"], "report.md"]
    return config


def on_files(files: Files, config: Any) -> Files:
    made = {
        "api.md": public_api(),
        "report.md": REPORT,
        **{f"{name}.md": (ROOT / f"{name}.md").read_text(encoding="utf-8") for name in TOP},
        **{f"rooms/{room}.md": room_page(room, modules) for room, modules in rooms().items()},
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links to files outside docs/ into links to added pages, or plain names. Hide the side bar beside the wide keys.md."""
    uri = page.file.src_uri
    if uri == "keys.md":
        page.meta["hide"] = ["toc"]
    markdown = re.sub(rf"\]\(\.\./({'|'.join(TOP)})\.md", r"](\1.md", markdown)
    if uri.removesuffix(".md") in TOP:
        markdown = markdown.replace("](docs/", "](")
    return re.sub(r"\[([^]]+)\]\(\.\./(?:README\.md|LICENSE|examples/[^)]*|scripts/[^)]*)\)", r"\1", markdown)


def rooms() -> dict[str, list[str]]:
    """{room: its modules}, for rooms with public names."""
    found: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if EXPORTED & set(parts[1:-1]) or parts[-1] in ("__init__", "__main__"):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.ClassDef)
        if any(isinstance(node, kinds) and not node.name.startswith("_") for node in tree.body):
            found.setdefault(parts[0], []).append(".".join(("flextron_mcore", *parts)))
    return found


def room_page(room: str, modules: list[str]) -> str:
    """Markdown of a room's page: each module with its public names."""
    return f"# `{room}`\n\n" + "\n\n".join(f"::: {module}" for module in modules) + "\n"


def public_api() -> str:
    """Markdown of the page of `flextron_mcore/__init__.py`, whose names live in other modules."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    homes = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flextron_mcore")
        for alias in node.names
    }
    text = "# Public API\n\n`from flextron_mcore import ...`\n\n"
    return text + "\n\n".join(f"::: {home}.{name}" for name, home in sorted(homes.items())) + "\n"
