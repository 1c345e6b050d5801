"""Steps that all formats share: check the directory, copy the tokenizer, count the bytes written."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer

from flextron_mcore.config import FlextronError
from flextron_mcore.data.tokenizer import read_vocabulary
from flextron_mcore.data.tokenizer_files import copy_tokenizer
from flextron_mcore.exports.formats import Job
from flextron_mcore.families.family import Family
from flextron_mcore.files import explain, read_json
from flextron_mcore.runtime.disk import check_space

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def begin(job: Job, size: int, tokenizer: str = "") -> None:
    """Check that job.out is an empty directory with room for the export, and copy job.tokenizer if there is one.

    Call on the main process.

    Args:
        job: the export.
        size: bytes of the weights to write.
        tokenizer: folder of job.out for the tokenizer; empty: job.out itself.

    Raises:
        FlextronError: the directory is not empty, the disk is too full, or job.tokenizer is damaged or no tokenizer.
    """
    check_empty(job.out)
    check_space(job.out, size)
    if job.tokenizer:
        take_tokenizer(job.tokenizer, job.out / tokenizer)


def check_empty(out: Path) -> None:
    """Raise FlextronError unless `out` is an empty directory."""
    if not out.is_dir() or any(out.iterdir()):
        raise FlextronError(f"out={out}: not an empty directory: choose another, or empty it")


def write_code(out: Path, source: Path, names: Iterable[str], family: Family) -> None:
    """Write the Python files of an export.

    A family without files of its own gets those of another family, in which its name replaces the other's.

    Args:
        out: directory of the export.
        source: directory of the format's code.
        names: names of the files in the export, without .py.
        family: family of the exported model.
    """
    for name in names:
        text = (source / f"{family.code_file(name)}.py").read_text(encoding="utf-8")
        (out / f"{name}.py").write_text(family.renamed(text), encoding="utf-8")


def figures(out: Path, name: str, architecture: str, parameters: int) -> dict[str, Any]:
    """Figures of a written export for metrics.json. Call on the main process.

    Returns {"format", "architecture", "parameters": number of parameters, "bytes": size of all files, "files": number of files}.

    Args:
        out: directory of the export.
        name: name of the format.
        architecture: name of the model's class in the format.
        parameters: number of parameters written.
    """
    sizes = [file.stat().st_size for file in out.rglob("*") if file.is_file()]
    return {
        "format": name,
        "architecture": architecture,
        "parameters": parameters,
        "bytes": sum(sizes),
        "files": len(sizes),
    }


def load_with_own_code(folder: Path) -> PreTrainedModel:
    """Load an exported directory as a transformers model in fp32, with the code in the directory, for evaluation.

    transformers copies the directory's code into the user's cache before it runs it; here it copies to a temporary directory.
    """
    from transformers import AutoModelForCausalLM, dynamic_module_utils  # late: slow to import

    package = dynamic_module_utils.TRANSFORMERS_DYNAMIC_MODULE_NAME
    usual, known, path = dynamic_module_utils.HF_MODULES_CACHE, set(sys.modules), list(sys.path)
    with tempfile.TemporaryDirectory(prefix="flextron-") as cache:
        dynamic_module_utils.HF_MODULES_CACHE = cache
        kept = {name: sys.modules.pop(name) for name in known if name.partition(".")[0] == package}
        sys.path[:] = [place for place in path if not (Path(place) / package).is_dir()]  # the user's cache would be found first
        try:
            return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
        finally:
            dynamic_module_utils.HF_MODULES_CACHE = usual
            for name in [name for name in sys.modules if name.partition(".")[0] == package]:
                del sys.modules[name]  # the code's files are removed after this
            sys.modules.update(kept)
            sys.path[:] = path


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, indented by two spaces."""
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def take_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer of the directory `source` into `target`.

    The copy's configuration gets `model_input_names` without token types, unless it has one: transformers 4 would add token
    types, which no model here takes. Raises FlextronError if there is no tokenizer, or a file of it is damaged.
    """
    if not copy_tokenizer(source, target):
        raise FlextronError(
            f"tokenizer={source}: no tokenizer in it: name a directory with tokenizer.json, tokenizer.model or vocab.json"
        )
    for file in sorted(source.glob("*.json")):
        if (target / file.name).is_file():
            _check(file)
    if (source / "tokenizer.json").is_file():
        try:
            Tokenizer.from_file(str(source / "tokenizer.json"))
        except Exception as error:  # the Rust library raises plain Exception
            reason = " ".join(str(error).split())[:200]
            raise FlextronError(f"tokenizer={source}: tokenizer.json is damaged: {reason}: copy it again") from None
    read_vocabulary(source)
    config_file = target / "tokenizer_config.json"
    if config_file.is_file():
        config = read_json(config_file)
        config.setdefault("model_input_names", ["input_ids", "attention_mask"])
        config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(file: Path) -> None:
    """Raise FlextronError unless a file of a tokenizer holds a JSON object."""
    try:
        found = read_json(file)
    except (ValueError, OSError) as error:
        raise FlextronError(f"tokenizer={file.parent}: {file.name} is damaged: {explain(error)}: copy it again") from None
    if not isinstance(found, dict):
        raise FlextronError(f"tokenizer={file.parent}: {file.name} is damaged: not a JSON object: copy it again")
