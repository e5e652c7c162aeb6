"""The house holds: a module imports only from floors below its own, and importing stays light where it must."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import time
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from entangle.cli import COMMANDS
from entangle.config import Options

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
    {"integrations"},
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


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_where_its_line_says(name: str):
    """Function, options and page of a line of COMMANDS are there, in their rooms."""
    command = COMMANDS[name]
    module, _, function = command.function.partition(":")
    assert room_of(module) in ("commands", "report")
    assert callable(getattr(importlib.import_module(module), function))
    assert room_of(command.options) == "config" and issubclass(command.config, Options)
    assert (ROOT / "docs" / "commands" / f"{name}.md").is_file()
    assert command.line.endswith(".") and command.name == name


def test_the_architecture_page_draws_these_floors():
    drawn = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("```")[1].strip().splitlines()
    rooms = [set(line[:47].split()) for line in drawn]
    assert rooms == [floor for floor in reversed(FLOORS) if floor != {"__main__"}]


LIGHT = {
    "import entangle": ("import entangle", 0.1),
    "entangle --help": ("from entangle.cli import main; main(['--help'])", 0.15),
}
"""What must answer at once: a program, and the seconds that it may take on an idle machine."""


@pytest.mark.parametrize("what", LIGHT)
def test_help_and_import_need_no_torch_and_hardly_any_time(what: str):
    """Best of several, over an interpreter that does nothing, with a factor for a busy machine."""
    program, seconds = LIGHT[what]
    check = f"{program}; import sys; sys.exit('torch' in sys.modules)"
    assert best_of(check) - best_of("pass") < BUSY * seconds


BUSY = 3.0


def best_of(program: str, times: int = 5) -> float:
    """Seconds of the fastest of several runs, which must end well."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True)
        found.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr.decode()
    return min(found)


def test_nothing_is_unpickled_or_loaded_unsafely():
    for file in FILES:
        text = file.read_text()
        for word in ("import pickle", "torch.load(", "yaml.load(", "eval(", "weights_only=False"):
            safe = ".eval(" if word != "torch.load(" else "weights_only=True"
            found = [line for line in text.splitlines() if word in line and safe not in line]
            assert not found, f"{file}: {found}"
