"""What classes declare, read from their source: names and fields without importing torch, transformers or TRL.

A misspelt name is so answered at once, and stands in one place all the same: where the class is.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path


@cache
def declared_losses() -> dict[str, str | None]:
    """Names of the losses of the catalogue, with TRL's name of each."""
    found: dict[str, str | None] = {}
    for file in sorted(_folder("losses").glob("*.py")):
        for cls in _classes(file):
            texts = dict(_texts(cls))
            if "name" in texts:
                found[texts["name"]] = texts.get("trl")
    return found


def known_losses() -> dict[str, str | None]:
    """The same, with those that a program has registered by now."""
    losses = sys.modules.get("losses")
    if losses is None:
        return declared_losses()
    return {name: cls.trl for name, cls in losses.CATALOGUE.items()}


@cache
def declared_names(what: str) -> tuple[str, ...]:
    """Names of the diagnostics, formats, mitigations or rewards that the package has, in the order of their files.

    Args:
        what: diagnostic, format, mitigation or reward.
    """
    place = _folder("entangle") / _PLACES[what]
    files = sorted(place.glob("*.py")) if place.is_dir() else [place]
    trees = [ast.parse(file.read_text("utf-8")) for file in files]
    return tuple(name for tree in trees for node in tree.body for name in _names(node))


_PLACES = {
    "diagnostic": "diagnostics",
    "format": "data/formats",
    "mitigation": "analysis/mitigations.py",
    "reward": "rewards/functions.py",
}
"""By what is named, the folder or the file that declares it."""


@cache
def trainer_fields() -> frozenset[str]:
    """Options of TRL's DPOConfig and SFTConfig, and of transformers' TrainingArguments below them."""
    trl = _folder("trl") / "trainer"
    files = [trl / f"{name}_config.py" for name in ("dpo", "sft", "base")]
    return _fields([*files, _folder("transformers") / "training_args.py"])


@cache
def script_fields() -> frozenset[str]:
    """Options of `trl dpo` that aren't its trainer's: of its ModelConfig and ScriptArguments."""
    folder = _folder("trl")
    return _fields([folder / "trainer" / "model_config.py", folder / "scripts" / "utils.py"])


def _folder(package: str) -> Path:
    """Where an installed package is; a folder that isn't there for one that isn't installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else Path(package)


def _fields(files: list[Path]) -> frozenset[str]:
    found = set()
    for file in filter(Path.is_file, files):
        for cls in _classes(file):
            found |= {
                node.target.id
                for node in cls.body
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            }
    return frozenset(name for name in found if not name.startswith("_"))


def _classes(file: Path) -> list[ast.ClassDef]:
    return [node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]


def _names(node: ast.stmt) -> Iterator[str]:
    """The name of a class that sets `name`, or of a function under a decorator that is given one."""
    if isinstance(node, ast.ClassDef):
        yield from (text for target, text in _texts(node) if target == "name")
    elif isinstance(node, ast.FunctionDef):
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant):
                yield str(call.args[0].value)


def _texts(cls: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Names of a class body that are set to a text."""
    for node in cls.body:
        if isinstance(node, ast.AnnAssign | ast.Assign) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                yield ast.unparse(target), node.value.value
