"""How often something is saved that takes a while to save."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SHARE = 0.1
"""Of the time that may go into saving, at most."""


class Pace:
    """Save so seldom that little time goes into it: what takes a second to write is written every ten."""

    def __init__(self) -> None:
        self._saved_at, self._took = time.monotonic(), 0.0

    @property
    def is_due(self) -> bool:
        """Whether enough time has passed since it was saved last."""
        return time.monotonic() - self._saved_at >= self._took / SHARE

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around the saving, to learn how long it takes."""
        started = time.monotonic()
        yield
        self._saved_at = time.monotonic()
        self._took = self._saved_at - started
