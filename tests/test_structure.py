"""The house holds: a module imports only from floors below its own, and importing stays light where it must."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FLOORS: list[set[str]] = [
    {"losses", "version", "errors", "embedded"},
    {"geometry", "ledger", "rows", "config", "catalogue", "runs", "provenance", "rewards", "progress"},
    {"doctor", "mitigation", "regimes", "scores", "data", "shards"},
    {"models", "predictions", "gamma"},
    {"curves", "inputs", "summary", "knobs", "verify", "rollouts", "reward functions"},
    {"diagnostics", "modules", "signals"},
    {"report"},
    {"probe", "whatif"},
    {"reload"},
    {"training"},
    {"across", "estimate", "filter", "reporting", "tokens", "rft", "train"},
    {"joint", "compare", "sweep"},
    {"cli"},
    {"__main__"},
]
"""Rooms by floor, lowest first. A room is a module or a folder of `entangle`, or `losses`."""


def room_of(module: str) -> str | None:
    """The room that a module belongs to; None for other packages and for `entangle` itself."""
    first, *rest = module.split(".")
    if first == "losses":
        return "losses"
    return rest[0] if first == "entangle" and rest else None


def imported(tree: ast.AST) -> Iterator[str]:
    """Modules that a file imports, wherever the statement stands; not those for type checking alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "entangle":
            yield from (f"entangle.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        yield from imported(node)


FILES = [file for package in ("entangle", "losses") for file in sorted((ROOT / package).rglob("*.py"))]


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_module_imports_only_from_floors_below(file: Path):
    room = room_of(name_of(file))
    if room is None:  # the package itself lends public names on first use
        return
    floor = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    assert room in floor, f"give {room} a floor"
    for module in imported(ast.parse(file.read_text())):
        other = room_of(module)
        if other in floor and other != room:
            assert floor[other] < floor[room], f"{name_of(file)} imports {module}, which isn't below it"


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
