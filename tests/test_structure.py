"""The house holds: a module imports only from floors below its own, and importing stays light where it must."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS: list[set[str]] = [
    {"losses", "version", "errors", "embedded"},
    {"catalogue", "config"},
    {"analysis", "doctor"},
    {"tables"},
    {"figures"},
    {"scores"},
    {"data"},
    {"models"},
    {"runs"},
    {"rewards", "diagnostics"},
    {"measure"},
    {"training"},
    {"commands"},
    {"report"},
    {"cli"},
    {"__main__"},
]
"""Rooms by floor, lowest first. A room is a folder of `entangle`, one of its few modules, or `losses`."""

MODULES = {"__init__", "__main__", "cli", "errors", "version", "catalogue"}
"""The only modules that stand beside the rooms."""

MOST_ROOMS = 25


def room_of(module: str) -> str | None:
    """The room that a module belongs to; None for other packages and for `entangle` itself."""
    first, *rest = module.split(".")
    if first == "losses":
        return "losses"
    return rest[0] if first == "entangle" and rest else None


FILES = [file for package in ("entangle", "losses") for file in sorted((ROOT / package).rglob("*.py"))]


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES_OF_OURS = {name_of(file) for file in FILES}


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules that a file imports, wherever the statement stands, those for type checking included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                whole = f"{node.module}.{name.name}"
                yield whole if whole in MODULES_OF_OURS else node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


ARROWS = {
    name_of(file): {name for name in imported(ast.parse(file.read_text())) if room_of(name)} for file in FILES
}
"""By module, what it imports of our own."""


@pytest.mark.parametrize("module", ARROWS)
def test_module_imports_only_from_floors_below(module: str):
    room = room_of(module)
    if room is None:  # the package itself lends public names on first use
        return
    floor = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    assert room in floor, f"give {room} a floor"
    for other in {room_of(name) for name in ARROWS[module]} - {room, None}:
        assert other not in floor or floor[other] < floor[room], (
            f"{module} imports {other}, which isn't below it"
        )


def test_no_module_imports_itself_by_way_of_others():
    """Within a room, too: the graph of modules has no circle."""
    sorter = TopologicalSorter({module: ARROWS[module] & set(ARROWS) - {module} for module in ARROWS})
    sorter.prepare()  # raises CycleError, which names the circle


def test_rooms_are_few_and_nothing_lies_between_them():
    inside = {file.stem for file in (ROOT / "entangle").glob("*.py")}
    assert inside == MODULES
    rooms = {folder.name for folder in (ROOT / "entangle").iterdir() if (folder / "__init__.py").is_file()}
    assert len(rooms) <= MOST_ROOMS and rooms <= {name for floor in FLOORS for name in floor}


def test_losses_import_nothing_but_torch():
    for file in (ROOT / "losses").rglob("*.py"):
        others = {module.split(".")[0] for module in imported(ast.parse(file.read_text()))}
        assert others <= set(sys.stdlib_module_names) | {"torch", "losses"}, file


def test_help_needs_no_torch():
    """`entangle --help` answers at once: nothing heavy is imported for it."""
    program = "import sys; from entangle.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0


def test_nothing_is_unpickled_or_loaded_unsafely():
    for file in FILES:
        text = file.read_text()
        for word in ("import pickle", "torch.load(", "yaml.load(", "eval(", "weights_only=False"):
            safe = ".eval(" if word != "torch.load(" else "weights_only=True"
            found = [line for line in text.splitlines() if word in line and safe not in line]
            assert not found, f"{file}: {found}"
