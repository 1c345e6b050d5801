"""Messages in the source of the package, and the keys and commands that they name.

`SITES` has every call of `FlextronError`, `JobFailed`, `say`, `warn` and `print` with a message. A placeholder of an f-string is
a hole: its text is not known here. `Site.faults` types what a message names: it composes settings of a stage with each key, and
returns what is refused. `record` notes every refusal of this process, with the stage that was running.

`FLEXTRON_MESSAGES=FILE make test` notes them in all processes of the tests. Then `python -m tests.messages FILE` lists the
refusals that no test provoked.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from flextron_mcore.config import FlextronError
from flextron_mcore.settings.compose import compose, find_key
from flextron_mcore.settings.stages import STAGES
from flextron_mcore.settings.training import StageSettings
from tests.provoked.sitecustomize import note

PACKAGE = Path(__file__).parents[1] / "flextron_mcore"
PROVOKED = Path(__file__).with_name("provoked")  # on the PYTHONPATH of processes that note their refusals
HOLE = "\0"  # stands for text that only a run knows
# Names before an equals sign in messages that are not keys of a stage, and what they are.
FOREIGN = {
    "WORLD_SIZE": "environment variable of torchrun",
    "FLEXTRON_STOP_AT": "environment variable that a job's script sets",
    "FLEXTRON_JOB_END": "environment variable that a job's script sets",
    "FLEXTRON_RANK_TIMEOUT": "environment variable of the watch",
    "safe_serialization": "argument of transformers' save_pretrained",
    "apply_rope_fusion": "field of Megatron-Core's TransformerConfig",
    "softmax_type": "field of Megatron-Core's TransformerConfig",
    "backend": "argument of flextron_mcore.layer_spec",
    "eos_token_id": "entry of a generation_config.json",
    "NAME": "stands for a name of the user's",
    "key": "stands for any key",
    "space.layer_ranking": "entry of a checkpoint's flextron.json",
    "space.modulation": "entry of a checkpoint's flextron.json",
    "space.compensation": "entry of a checkpoint's flextron.json",
}
_KEY = re.compile(rf"(?<![\w.{HOLE}/-])([A-Za-z_{HOLE}][\w.{HOLE}]*)=(\[[^\]]*\]|[^\s,;:)`']*)")
_COMMAND = re.compile(rf"`flextron ([\w{HOLE}]+)([^`]*)`")
_TYPED = re.compile(rf"(?<!`)\bflextron ([\w{HOLE}]+)((?: [\w.]+=\S*)+)")
_OTHERS = re.compile(r"`(?!flextron )[a-z]+ [^`]*`")  # commands of other programs
_OF_STAGE = re.compile(rf"\b((?:{'|'.join(STAGES)}|training)\.[a-z_]+(?:\.[a-z_]+)*)(?![\w.])")
_DOTTED = re.compile(rf"(?<![\w.{HOLE}/$-])([a-z_]+(?:\.[a-z_]+)+)(?![\w.=(/-])")


@dataclass(frozen=True)
class Site:
    """A message in the source. text: its f-string, with a HOLE for each placeholder that is not a choice of texts."""

    file: str
    line: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text.replace(HOLE, '{}')}"

    def faults(self, stage: str | None = None, message: str = "") -> list[str]:
        """Complaints about keys and commands of the message that cannot be typed.

        Keys before the first colon repeat what the user typed: any stage may have them. Keys after it must all be keys of
        `stage`, or of some one stage if that is None. message: the text in a run; keys that it does not contain are left out.
        """
        found = []
        for name, rest in [*_COMMAND.findall(self.text), *_TYPED.findall(self.text)]:
            if name in STAGES:
                found += _refused(name, _keys(rest))
            elif HOLE not in name:
                found.append(f"`flextron {name}`: no such stage")
        subject, colon, advice = _OTHERS.sub("", _COMMAND.sub("", self.text)).partition(": ")
        typed, advised = (_keys(subject), _keys(advice)) if colon else ([], _keys(subject))
        found += [fault for name, _ in typed for fault in _least(STAGES, [(name, "")])]
        place = Path(self.file)
        if place.parts[0] == "stages" and place.stem.rstrip("_") in STAGES:
            stage = place.stem.rstrip("_")
        elif place.parts[0] == "launch" and place.name != "layout.py":
            stage = "launch"
            found += _refused(stage, [(name, "") for name in _OF_STAGE.findall(message)])
        elif stage == "launch":
            stage = None  # `launch` passes on messages about keys of the stages that it plans
        if stage == "launch" and subject == HOLE:  # the message begins with a stage's name, and names that stage's keys
            advised = [(name, value) for name, value in advised if _least(STAGES.keys() - {"launch"}, [(name, "")])]
        if message:
            advised = [(name, value) for name, value in advised if name in message]
        return found + _least(STAGES if stage is None else [stage], advised)


def _keys(text: str) -> list[tuple[str, str]]:
    """(name, value) of each `name=value` in a text, and (name, HOLE) of each dotted name that begins with a section of keys."""
    sections = {name.partition(".")[0] for schema in STAGES.values() for name in _names(schema) if "." in name}
    found = [(name, value) for name, value in _KEY.findall(text) if name not in FOREIGN and HOLE not in name]
    dotted = [name for name in _DOTTED.findall(text) if name.partition(".")[0] in sections and name not in FOREIGN]
    return found + [(name, HOLE) for name in dotted]


@functools.cache
def _names(schema: type[StageSettings]) -> frozenset[str]:
    from flextron_mcore.settings.schema import keys

    return frozenset(keys(schema))


def _least(stages: Iterable[str], keys: list[tuple[str, str]]) -> list[str]:
    """Complaints about the keys, of that one of `stages` which complains least."""
    return min((_refused(stage, keys) for stage in stages), key=len)


def _refused(stage: str, keys: list[tuple[str, str]]) -> list[str]:
    """Complaints of a stage about unknown keys and bad values."""
    found = []
    for name, value in keys:
        try:
            needed = ""
            if name not in STAGES[stage].recipes and not _is_section(stage, name):
                needed = find_key(STAGES[stage], name)[1].limits.only
            if value and HOLE not in value and "..." not in value:
                compose(stage, [*filter(None, [needed]), f"{name}={value}"], partial=True)
        except FlextronError as error:
            found.append(str(error))
    return found


def _is_section(stage: str, name: str) -> bool:
    return any(known.startswith(f"{name}.") for known in _names(STAGES[stage]))


def _sites() -> Iterator[Site]:
    for file in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                chosen = {
                    node.targets[0].id: node.value
                    for node in ast.walk(function)
                    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
                }
                for node in _own(function):
                    kind = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                    if kind in ("FlextronError", "JobFailed", "say", "warn", "print") and node.args:
                        text = _text(node.args[0], chosen)
                        yield Site(file.relative_to(PACKAGE).as_posix(), node.lineno, kind, text)


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a function without those of functions inside of it."""
    for node in ast.iter_child_nodes(function):
        if not isinstance(node, ast.FunctionDef):
            yield node
            yield from _own(node)


def _text(node: ast.expr, chosen: dict[str, ast.expr]) -> str:
    """Text of a message with HOLE for each unknown part. chosen: {name: value} of the assignments in the message's function."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part, chosen) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, chosen)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, chosen) + _text(node.right, chosen)
    if isinstance(node, ast.IfExp):
        return f"{_text(node.body, chosen)} {_text(node.orelse, chosen)}"
    if isinstance(node, ast.Name) and isinstance(chosen.get(node.id), ast.Constant | ast.JoinedStr | ast.IfExp):
        return _text(chosen[node.id], {})
    return HOLE


SITES = {(site.file, site.line): site for site in _sites()}
# Files that catch a refusal and try something else, so that its message never reaches a user.
ALTERNATIVES = ("space.py", "evaluation/comparison.py", "exports/card.py", "exports/megatron/__init__.py")
_RECORDED: list[tuple[Site, str | None, FlextronError]] = []  # refusals of this test: where, by which stage, error


def record() -> None:
    """Start to note every FlextronError that the package makes."""

    def init(self: FlextronError, *args: object) -> None:
        Exception.__init__(self, *args)
        frame = sys._getframe(1)
        note(frame.f_code, frame.f_lineno)
        file = Path(frame.f_code.co_filename)
        site = SITES.get((file.relative_to(PACKAGE).as_posix(), frame.f_lineno)) if file.is_relative_to(PACKAGE) else None
        if site:
            _RECORDED.append((site, _running(frame), self))

    FlextronError.__init__ = init


def take_recorded() -> set[tuple[Site, str | None, str]]:
    """Refusals since the last call that reach a user, on their own or in another message: (site, stage, message) each."""
    found = set()
    for site, stage, error in _RECORDED:
        caught = error.__traceback__ and Path(error.__traceback__.tb_frame.f_code.co_filename)  # file of the outermost frame
        inside = caught and caught.is_relative_to(PACKAGE)
        if not inside or caught.relative_to(PACKAGE).as_posix() not in ALTERNATIVES:
            found.add((site, stage, str(error)))
    _RECORDED.clear()
    return found


def _running(frame: FrameType | None) -> str | None:
    """Stage of the innermost command that a frame belongs to; None outside of one."""
    while frame:
        settings = frame.f_locals.get("settings")
        if isinstance(settings, StageSettings):
            return settings.stage
        frame = frame.f_back
    return None


def never_provoked(record: Path) -> list[Site]:
    """Refusals that no process of the tests has made. record: file of FLEXTRON_MESSAGES of a run of the present source."""
    provoked = set()
    for line in record.read_text(encoding="utf-8").splitlines():
        file, _, number = line.rpartition(":")
        if Path(file).is_relative_to(PACKAGE):
            provoked.add((Path(file).relative_to(PACKAGE).as_posix(), int(number)))
    return [site for place, site in SITES.items() if site.kind in ("FlextronError", "JobFailed") and place not in provoked]


if __name__ == "__main__":
    for missing in never_provoked(Path(sys.argv[1])):
        print(missing)
