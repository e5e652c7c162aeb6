"""The one sha256 that names data, files and options; what is hashed, and how, stands with the thing itself."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def sha256_of(parts: Iterable[bytes]) -> str:
    """The sha256 of some bytes, one part after the other, as 64 hexadecimal digits.

    Examples:
        >>> sha256_of([b"pref", b"erence"]) == sha256_of([b"preference"])
        True
    """
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def hash_file(path: str | Path) -> str:
    """The sha256 of a file's content, read piece by piece."""
    with Path(path).open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
