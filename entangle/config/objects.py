"""The losses that options name, as objects. The only place here that waits for torch, once it is called."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from entangle.config.specs import construct

if TYPE_CHECKING:
    from losses import PreferenceLoss


def build_losses(specs: Iterable[Any]) -> list[PreferenceLoss]:
    """The losses that options name.

    Args:
        specs: a name, `name:key=value,...`, a mapping, `module:Class` of the user's own, or a loss, each.

    Raises:
        ConfigError: one isn't known, or a hyper-parameter of it isn't, or makes no sense.
    """
    from losses import CATALOGUE, PreferenceLoss

    return [construct(spec, CATALOGUE, PreferenceLoss, "loss") for spec in specs]
