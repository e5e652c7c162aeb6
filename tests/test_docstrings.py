"""Docstrings of the rooms that people read for their mathematics: every argument is explained, and examples run."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import pytest

ROOMS = ("losses", "entangle.analysis", "entangle.scores", "entangle.rewards", "entangle.training")

WORKED = ("losses", "entangle.analysis")
"""Rooms of which every module has an example with numbers; `--doctest-modules` runs it."""

NO_EXAMPLE = {"losses.base", "losses.functional", "losses.numerics"}
"""Modules that hold no family of losses; they have their examples where there is something to show."""


def modules(room: str) -> list[ModuleType]:
    """A room's modules, the private ones left out."""
    package = importlib.import_module(room)
    names = [f"{room}.{info.name}" for info in pkgutil.iter_modules(package.__path__)]
    return [importlib.import_module(name) for name in names]


MODULES = [module for room in ROOMS for module in modules(room)]


def functions(module: ModuleType) -> Iterator[tuple[str, FunctionType]]:
    """The public functions of a module and the methods of its public classes; what overrides another is left out."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield name, inspect.unwrap(value)
        elif inspect.isclass(value):
            yield from methods(value)


def methods(cls: type[Any]) -> Iterator[tuple[str, FunctionType]]:
    """A class's own public methods."""
    for name, value in vars(cls).items():
        inherited = any(name in vars(base) for base in cls.__mro__[1:])
        function = getattr(value, "__func__", value)
        if inspect.isfunction(function) and not name.startswith("_") and not inherited:
            yield f"{cls.__name__}.{name}", function


def explained(docstring: str) -> set[str]:
    """The names that stand in a docstring's Args."""
    section = re.search(r"^Args:\n((?: +.*\n|\n)+)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    return set(re.findall(r"^ {4}\*{0,2}(\w+):", section[1], re.MULTILINE)) if section else set()


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_argument_of_a_public_function_is_explained(module: ModuleType):
    """Of those with two arguments or more; one argument is explained by the sentence itself."""
    for name, function in functions(module):
        arguments = [n for n in inspect.signature(function).parameters if n not in ("self", "cls")]
        if len(arguments) > 1 and not (function.__doc__ or "").startswith("See `"):
            missing = [n for n in arguments if n not in explained(function.__doc__ or "")]
            assert not missing, f"{module.__name__}.{name}: Args lacks {', '.join(missing)}"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_families_of_losses_and_modules_of_analysis_have_a_worked_example(module: ModuleType):
    if module.__name__.rpartition(".")[0] in WORKED and module.__name__ not in NO_EXAMPLE:
        assert ">>> " in inspect.getsource(module), f"{module.__name__} has no example"


def test_the_rule_sees_what_is_missing():
    docstring = (
        "One line.\n\nArgs:\n    first: a.\n        more: of a.\n    **rest: b.\n\nReturns:\n    c: d."
    )
    assert explained(docstring) == {"first", "rest"}
