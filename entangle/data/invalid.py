"""Rows that can't be used: refused together, by number, or left out and counted."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from entangle.errors import DataError

logger = logging.getLogger(__name__)


def report_invalid(invalid: Mapping[int, DataError], source: str, *, skip: bool) -> None:
    """Refuse the rows, by the first one's error and the others' numbers; or log that they are left out.

    Raises:
        DataError: unless they are to be skipped.
    """
    first, error = next(iter(invalid.items()))
    others = list(invalid)[1:]
    more = ""
    if others:
        shown = ", ".join(map(str, others[:10])) + (", ..." if len(others) > 10 else "")
        more = f" So can't {len(others)} more row{'s' * (len(others) > 1)}: {shown}."
    if skip:
        logger.warning("Left out %d of the rows of %s. The first: %s%s", len(invalid), source, error, more)
        return
    raise DataError(
        f"{error}{more} Repair or remove these rows, or leave them out with --skip_invalid."
    ) from invalid[first]
