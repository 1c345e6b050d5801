"""The order of the package's rooms (modules and folders): one imports only those before it, and commands never each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flextron_mcore"
# Lowest first: a room imports only rooms of lines above its own. Rooms on one line do not import each other.
FLOORS = """
config
files
digests
families
axes
space
cost flops settings
runtime choices
data checkpoint
layers
routers specs choosing
selection model
pipeline
evaluation
sorting training
latency doors
exports report
launch
runs
adaptive
stages
api
cli
__main__
""".strip().splitlines()
FLOOR = {room: floor for floor, line in enumerate(FLOORS) for room in line.split()}
# Code that is copied into exported directories and runs without this package.
EXPORTED = ("code", "flextron_trtllm")


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    found = [file for file in sorted(PACKAGE.rglob("*.py")) if not set(EXPORTED) & set(file.parts)]
    return [file for file in found if file != PACKAGE / "__init__.py"]


def imported(file: Path) -> list[str]:
    """Modules of the package that a file imports, anywhere in it, without the package's name."""
    package = ["flextron_mcore", *file.relative_to(PACKAGE).parts[:-1]]
    modules = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*parts, *([node.module] if node.module else [])])
            # `from flextron_mcore import x` and `from flextron_mcore.stages import x` import a room or a file of one
            modules += [f"{module}.{alias.name}" for alias in node.names]
    return [module.removeprefix("flextron_mcore.") for module in modules if module.startswith("flextron_mcore.")]


def test_every_room_has_a_floor():
    rooms = {room_of(file) for file in files()}
    assert rooms == set(FLOOR)


@pytest.mark.parametrize("room", FLOOR)
def test_a_room_imports_rooms_below_it(room):
    for file in files():
        if room_of(file) == room:
            above = [m for m in imported(file) if FLOOR.get(m.split(".")[0], -1) >= FLOOR[room] and m.split(".")[0] != room]
            assert not above, f"{file.relative_to(PACKAGE)} imports {above}"


def test_commands_never_import_each_other():
    for file in files():
        if room_of(file) == "stages":
            assert not [module for module in imported(file) if module.startswith("stages.")], file.name


def test_no_file_imports_itself_through_others():
    names = {".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file for file in files()}
    arrows: dict[str, set[str]] = {}
    for name, file in names.items():
        found = (m if m in names else m.rpartition(".")[0] for m in imported(file))
        arrows[name] = {m for m in found if m in names} - {name}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(arrows[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in arrows:
        visit(name, ())


# Folders of tests/ that do not belong to a single room.
OTHER_TESTS = {"parallel", "gpu", "slurm", "examples", "faults", "hostile", "provoked", "scale"}


def test_every_room_has_a_folder_of_tests():
    def folders(root: Path) -> set[str]:
        return {path.name for path in root.iterdir() if any(path.glob("*.py"))}

    assert folders(PACKAGE) == folders(PACKAGE.parent / "tests") - OTHER_TESTS
