"""Options of the callback as a trainer's YAML or plugin states them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from entangle.config.objects import build_losses
from entangle.config.specs import to_spec
from entangle.data import load_pairs, read_pairs
from entangle.errors import ConfigError
from entangle.training import EntanglementCallback

OF_CALLBACK = tuple(inspect.signature(EntanglementCallback).parameters)
"""Options of `EntanglementCallback`."""

OF_DATA = tuple(name for name in inspect.signature(read_pairs).parameters if name != "dataset_name")
"""Options of `entangle.data.read_pairs`: how the file of `pairs` is read."""

KEY = "entangle"
"""The key under which a YAML of another trainer holds them."""


def callback_of(
    options: Mapping[str, Any] | None, loss: Mapping[str, Any] | None = None
) -> EntanglementCallback:
    """The callback as options ask for it.

    Args:
        options: those of `EntanglementCallback` and of `read_pairs` together, such as `{"pairs": "probe.jsonl",
            "format": "sharegpt", "limit": 64, "every": 50}`; `pairs` may be a number: so many of the training's own.
        loss: the trained loss where options don't name one and the trainer's own file does.

    Raises:
        ConfigError: there are no options, or one isn't known.
        UserError: the pairs can't be read, or nothing is to be watched.
    """
    if not isinstance(options, Mapping) or not options:
        raise ConfigError(
            f"Expected options under the key {KEY}, such as {{pairs: probe.jsonl, every: 50}}; got {options!r}."
        )
    given = plain(options)
    if unknown := sorted(set(given) - {*OF_CALLBACK, *OF_DATA}):
        raise ConfigError(
            f"{KEY}: {', '.join(unknown)} isn't known. Known: {', '.join([*OF_CALLBACK, *OF_DATA])}."
        )
    reading = {name: given.pop(name) for name in OF_DATA if name in given}
    pairs = given.get("pairs")
    if isinstance(pairs, bool) or (reading and not isinstance(pairs, str | list)):
        raise ConfigError(
            f"{KEY}: pairs={pairs!r} with {', '.join(reading) or 'nothing else'}. Expected a file or a data set, or a "
            "number of pairs of the training's own, which needs no options of reading."
        )
    if reading:
        given["pairs"] = load_pairs(pairs, **reading)
    named = given.get("loss", loss)
    if named is not None:
        given["loss"] = build_losses([to_spec(named)])[0]
    return EntanglementCallback(**given)


def plain(value: Any) -> Any:
    """Mappings and lists of a trainer's own kinds as dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value
