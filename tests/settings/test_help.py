"""Help and docs/keys.md agree with the schemas."""

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
PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]


def test_the_page_of_keys_is_that_of_the_schemas():
    assert (ROOT / "docs/keys.md").read_text() == key_page(), "python -m flextron_mcore.settings.help > docs/keys.md"


@pytest.mark.parametrize("page", PAGES)
def test_keys_of_commands_in_documents_exist(page):
    """Every key=value of a `flextron STAGE` command in a code block or in backticks."""
    text = (ROOT / page).read_text()
    commands = re.findall(r"^(?:\$ )?flextron ([a-z]+)\b(.*(?:\\\n.*)*)", text, re.M) + re.findall(
        r"`flextron ([a-z]+)\b([^`\n]*)`", text
    )
    for stage, rest in commands:
        assert stage in STAGES, stage
        for name in re.findall(r"(?<=[ '])([a-z][\w.]*)=", rest.partition("#")[0]):
            if name not in STAGES[stage].recipes:
                find_key(STAGES[stage], name)


def test_an_architecture_has_the_fields_of_a_model():
    assert {each.name for each in fields(ArchitectureSettings)} == {each.name for each in fields(ModelConfig)}
    defaults = {each.name: each.default for each in fields(ModelConfig)}
    for each in fields(ArchitectureSettings):
        assert each.default in (defaults[each.name], "???", None), each.name


def test_every_key_says_what_it_is():
    for schema in STAGES.values():
        assert all(key.limits.help for key in keys(schema).values())
