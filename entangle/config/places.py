"""Names of models, data and runs: which of them mean a path, and the refusal of paths where nothing is.

No library is imported for it, so that a wrong path is answered at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from enum import Enum
from pathlib import Path

from entangle.errors import DataError, ModelError, RunError

DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
"""Files of data that can be read."""

FOREIGN_SUFFIXES = (
    ".txt",
    ".tsv",
    ".gz",
    ".bz2",
    ".xz",
    ".zip",
    ".zst",
    ".pkl",
    ".pickle",
    ".yaml",
)
"""Endings that mean a file, too, but not one that can be read."""


def is_local(name: str | Path, suffixes: Sequence[str] = ()) -> bool:
    """Whether `name` means a path, there or not, and not a hub id (`name` or `owner/name`)."""
    text = str(name)
    return (
        isinstance(name, Path)
        or os.path.exists(text)
        or text.startswith((".", "/", "~", "\\"))
        or text.count("/") > 1
        or ("/" in text and os.path.isdir(text.partition("/")[0]))  # a folder that is here has it misspelt
        or "\\" in text
        or text.lower().endswith(tuple(suffixes))
    )


def near(name: str | Path) -> str:
    """What is here under a name like the one given, as a sentence; empty where nothing is."""
    path = Path(name).expanduser()
    there = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    found = get_close_matches(path.name, there, n=1, cutoff=0.75)
    return f" Is {str(path.parent / found[0])!r} meant?" if found else ""


def require_data(name: str | Path) -> None:
    """Refuse a path of data where nothing is; a hub id passes.

    Raises:
        DataError: there is neither a file nor a folder.
    """
    path = os.path.expanduser(name)
    if is_local(name, (*DATA_SUFFIXES, *FOREIGN_SUFFIXES)) and not os.path.exists(path):
        raise DataError(
            f"Expected a file or folder at {path}; there is none (working folder: {os.getcwd()}).{near(path)}"
        )


def require_model(name: str | Path) -> None:
    """Refuse a path of a model or an adapter where no folder is; a hub id passes.

    Raises:
        ModelError: there is no folder.
    """
    if is_local(name) and not os.path.isdir(os.path.expanduser(name)):
        raise ModelError(
            f"Expected a folder with a model or an adapter at {name}; there is none (working folder: {os.getcwd()})."
            f"{near(name)}"
        )


def require_run(path: str | Path) -> None:
    """Refuse a folder that holds no run.

    Raises:
        RunError: there is no config.yaml in it.
    """
    if os.path.isfile(os.path.join(path, "config.yaml")):
        return
    message = f"Expected a run folder (with config.yaml) at {path}; found none."
    if not os.path.exists(path):
        message += near(path)
    elif os.path.isdir(path) and any(name.startswith("checkpoint-") for name in os.listdir(path)):
        message += (
            f" It holds the checkpoints of a training: entangle doctor {path} reads its log, and entangle sweep {path} "
            "--dataset_name PAIRS probes its checkpoints into a run folder."
        )
    raise RunError(message)


class Place(Enum):
    """What an option names; stands in the `Annotated` of its field."""

    MODEL = "model"
    DATA = "data"
    RUN = "run"

    @property
    def require(self) -> Callable[[str], None]:
        """The refusal of a name that means a path where nothing is."""
        return {Place.MODEL: require_model, Place.DATA: require_data, Place.RUN: require_run}[self]
