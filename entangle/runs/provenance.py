"""What a run's numbers were computed from, and on: versions, hashes, device, precision, time."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from entangle.config.hashing import sha256_of
from entangle.version import __version__

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "pandas", "pyarrow")


def environment() -> dict[str, Any]:
    """Versions, commit, processor and threads of this process."""
    return {
        "entangle": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def hash_texts(texts: Iterable[str]) -> str:
    """sha256 over a sequence of texts, each closed by a zero byte."""
    return sha256_of(text.encode("utf-8", "surrogatepass") + b"\0" for text in texts)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that the package runs from, with `-dirty` where it was changed; None in a wheel."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip()
