"""config.json of a Hugging Face directory, without its weights. No torch import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flextron_mcore import files
from flextron_mcore.config import FlextronError, ModelConfig
from flextron_mcore.families import family_of_config
from flextron_mcore.families.code_keys import without_code
from flextron_mcore.families.family import Family
from flextron_mcore.files import explain


def read_json(file: Path) -> dict[str, Any]:
    """JSON object of a file in a Hugging Face directory. Raises FlextronError naming the file if it is missing or damaged."""
    try:
        values = files.read_json(file)
    except FileNotFoundError:
        raise FlextronError(f"{file}: no such file: set hf= to the directory of a Hugging Face model") from None
    except (ValueError, OSError) as error:
        raise FlextronError(f"{file}: not readable as JSON ({explain(error)}): download it again") from None
    if not isinstance(values, dict):
        raise FlextronError(f"{file}: not a JSON object: download it again")
    return values


def check_directory(path: Path) -> None:
    """Raise FlextronError unless `path`, the value of hf=, is a directory."""
    if not path.is_dir():
        raise FlextronError(f"hf={path}: no such directory: name the directory of a Hugging Face model on this machine")


def read_config(path: Path) -> tuple[dict[str, Any], Family, ModelConfig]:
    """(config.json without keys that name code, family, architecture) of a Hugging Face directory; weights are not looked at.

    Raises FlextronError for a file that is missing or damaged, and for an architecture or option that is not supported.
    """
    file = path / "config.json"
    config = without_code(read_json(file))
    try:
        family = family_of_config(config)
        return config, family, family.model_config(config)
    except FlextronError as error:
        raise FlextronError(f"{file}: {error}") from None
