"""Options of `entangle losses`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from entangle.config.base import Options
from entangle.config.kinds import Loss


@dataclass(frozen=True)
class LossesConfig(Options):
    """The catalogue of losses; `entangle losses NAME` explains one."""

    name: Annotated[Loss | None, tyro.conf.Positional] = None
    """A loss to explain: name or name:key=value,..."""
    family: str | None = None
    """Only this family, a module of `losses`: margin, say. An unknown one is answered with those that there are."""
    needs_reference: bool | None = None
    """Only losses that compare with a reference policy (True), or that don't (False)."""
    batch_coupled: bool | None = None
    """Only losses whose incentives depend on the rest of the batch (True), or don't (False)."""
    needs_tokens: bool | None = None
    """Only losses that weigh tokens one by one (True), or don't (False)."""
    markdown: bool = False
    """Print the table as Markdown."""
