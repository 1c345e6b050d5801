"""Help texts, docs/keys.md and keys in the documents agree with the schemas of the stages."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from flextron_mcore.config import ModelConfig
from flextron_mcore.settings.compose import find_key
from flextron_mcore.settings.help import key_page
from flextron_mcore.settings.schema import keys
from flextron_mcore.settings.sections import ArchitectureSettings
from flextron_mcore.settings.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *(str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs").rglob("*.md")))]


def test_the_page_of_keys_is_that_of_the_schemas():
    assert (ROOT / "docs/keys.md").read_text() == key_page(), "python -m flextron_mcore.settings.help > docs/keys.md"


@pytest.mark.parametrize("page", PAGES)
def test_keys_of_commands_in_documents_exist(page):
    """Every key=value of a `flextron STAGE` command, in a code block or in backticks, is a key of that stage."""
    text = (ROOT / page).read_text()
    commands = re.findall(r"^(?:\$ )?flextron ([a-z]+)\b(.*(?:\\\n.*)*)", text, re.M) + re.findall(
        r"`flextron ([a-z]+)\b([^`\n]*)`", text
    )
    for stage, rest in commands:
        assert stage in STAGES, stage
        for name in re.findall(r"(?<=[ '])([a-z][\w.]*)=", rest.partition("#")[0]):
            if name not in STAGES[stage].recipes:
                find_key(STAGES[stage], name)


KEYS = {name for schema in STAGES.values() for name in (*keys(schema), *schema.recipes)}
SECTIONS = {name.rpartition(".")[0] for name in KEYS} - {""}
# Names before an equals sign in the documents that belong to other programs or to Python.
OTHERS = {"trust_remote_code", "enable_checkpointing", "code", "key"}


@pytest.mark.parametrize("page", PAGES)
def test_keys_in_the_text_of_documents_exist(page):
    """Every `key=value`, and every dotted name that begins with a section of keys, in backticks is a key of some stage."""

    def known(name: str) -> bool:
        return any(each in KEYS | SECTIONS for each in (name, name.partition(".")[2]))

    quoted = [
        text for text in re.findall(r"`([^`\n]+)`", (ROOT / page).read_text()) if not re.match(r"(flextron|python|make) ", text)
    ]
    assigned = {name for text in quoted for name in re.findall(r"^([a-z_]+(?:\.[a-z_]+)*)=", text)} - OTHERS
    dotted = {text for text in quoted if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", text) and text.partition(".")[0] in SECTIONS}
    assert not [name for name in sorted(assigned | dotted) if not known(name) and not name.endswith(".py")]


def test_an_architecture_has_the_fields_of_a_model():
    assert {each.name for each in fields(ArchitectureSettings)} == {each.name for each in fields(ModelConfig)}
    defaults = {each.name: each.default for each in fields(ModelConfig)}
    for each in fields(ArchitectureSettings):
        assert each.default in (defaults[each.name], "???", None), each.name


def test_every_key_says_what_it_is():
    for schema in STAGES.values():
        assert all(key.limits.help for key in keys(schema).values())
