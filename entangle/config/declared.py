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


def _texts(cls: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Annotated names of a class body that are set to a text."""
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield ast.unparse(node.target), node.value.value
