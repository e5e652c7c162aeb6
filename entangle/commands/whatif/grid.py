"""Grids of hyper-parameters: `loss.field=1,2,3`, or `field=1,2,3` for every loss that has the field."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import yaml

from entangle.errors import ConfigError
from losses import PreferenceLoss


def apply_grid(losses: Sequence[PreferenceLoss], grid: Sequence[str]) -> list[PreferenceLoss]:
    """Losses with the settings of a grid, each label once; losses that no entry names stay as they are.

    Several entries for one loss are combined (their product).

    Raises:
        ConfigError: an entry can't be read, or names a loss or a hyper-parameter that isn't there.

    Examples:
        >>> from losses import DPO
        >>> [loss.label for loss in apply_grid([DPO()], ["dpo.beta=0.05,0.1"])]
        ['dpo(beta=0.05)', 'dpo']
    """
    entries = [_grid_entry(str(text), losses) for text in grid]
    settings: dict[str, PreferenceLoss] = {}
    for loss in losses:
        own: dict[str, list[Any]] = {}
        for name, field, values in entries:
            if name in (None, loss.name) and field in {f.name for f in fields(loss)}:
                own.setdefault(field, []).extend(values)
        for values in itertools.product(*own.values()):
            variant = _replace(loss, dict(zip(own, values, strict=True)))
            settings[variant.label] = variant
    return list(settings.values())


def _grid_entry(text: str, losses: Sequence[PreferenceLoss]) -> tuple[str | None, str, list[Any]]:
    key, equals, values = text.partition("=")
    name, dot, field = key.strip().rpartition(".")
    words = [word for word in values.split(",") if word.strip()]
    if not equals or not field or not words or (dot and not name):
        raise ConfigError(
            "A grid is given as loss.field=value,value,... or field=value,value,... (for instance "
            f"dpop.penalty=1,5,50); got {text!r}."
        )
    known = {f.name for loss in losses if name in ("", loss.name) for f in fields(loss)}
    if name and name not in {loss.name for loss in losses}:
        given = ", ".join(sorted({loss.name for loss in losses}))
        raise ConfigError(f"Grid {text!r} names the loss {name!r}, which isn't judged here. Judged: {given}.")
    if field not in known:
        owner = f"The loss {name!r} has" if name else "The judged losses have"
        raise ConfigError(
            f"Grid {text!r}: {owner} no hyper-parameter {field!r}. "
            f"Known: {', '.join(sorted(known)) or 'none'}."
        )
    return name or None, field, [_number(word, text) for word in words]


def _number(word: str, text: str) -> float | int:
    value = yaml.safe_load(word)
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"Grid {text!r}: expected numbers separated by commas; got {word.strip()!r}.")
    return value


def _replace(loss: PreferenceLoss, values: Mapping[str, Any]) -> PreferenceLoss:
    try:
        return dataclasses.replace(loss, **values)
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{error} Name the loss in the grid (loss.field=...) to set only that one."
        ) from error
