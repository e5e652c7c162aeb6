"""Runs over prompts that are broken off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from entangle.measure.prompts import PromptMeasurement


@contextmanager
def broken_at(index: int) -> Iterator[None]:
    """Ctrl-C when the prompt of this index is computed; the block must end so."""
    whole = PromptMeasurement.row

    def row(self, prompt, rollout):
        if prompt.index == index:
            raise KeyboardInterrupt
        return whole(self, prompt, rollout)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PromptMeasurement, "row", row)
        yield


@contextmanager
def recorded() -> Iterator[list[int]]:
    """Indices of the prompts that the block computes."""
    whole, computed = PromptMeasurement.row, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            PromptMeasurement,
            "row",
            lambda self, p, rollout: computed.append(p.index) or whole(self, p, rollout),
        )
        yield computed
