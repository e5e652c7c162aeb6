"""Kinds of options that no plain type describes: specs, settings as key=value, and names of what must be there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from tyro.constructors import PrimitiveConstructorSpec

from entangle.config.declared import declared_names
from entangle.config.places import Place
from entangle.config.specs import Spec, to_spec
from entangle.config.typed import Kind, Unfit, shown
from entangle.errors import ConfigError


def _spec(names: str = "NAME") -> str:
    """How help shows a spec, with the names that are known where they are few."""
    return f"{names}[:KEY=VALUE,...]|MODULE:NAME"


def _among(what: str) -> str:
    """The names that the package has, as help shows them: read from where they are declared."""
    return f"{{{','.join(declared_names(what))}}}"


def _one_spec(what: str) -> Kind:
    expected = f"a {what}, as name, name:key=value,... or code of your own"
    return Kind(expected, lambda value, name: _as_spec(value, name, what, expected), names=what)


def _many_specs(what: str, plural: str) -> Kind:
    expected = f"{plural}, each name, name:key=value,... or code of your own"

    def to_specs(value: Any, name: str) -> tuple[Spec, ...]:
        if value is None:
            raise Unfit
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_as_spec(item, name, what, expected) for item in items)

    return Kind(expected, to_specs, names=what)


def _as_spec(value: Any, name: str, what: str, expected: str) -> Spec:
    try:
        return to_spec(value, what)
    except ConfigError as error:
        is_text = isinstance(value, str) and value.strip()
        said = str(error) if is_text else f"expected {expected}; got {shown(value)}."
        raise ConfigError(f"{name}: {said}") from None


def _words(specs: Any) -> list[str]:
    return [spec if isinstance(spec, str) else json.dumps(spec, default=str) for spec in specs]


def _is_many(value: Any) -> bool:
    return isinstance(value, tuple)


def _anything(value: Any) -> bool:
    return True


def _first(words: Sequence[str]) -> str:
    return words[0]


def _one_word(value: Any) -> list[str]:
    return _words([value])


def _many(shown: str) -> PrimitiveConstructorSpec:
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{shown} ...",
        instance_from_str=tuple,
        is_instance=_is_many,
        str_from_instance=_words,
    )


def _one(shown: str) -> PrimitiveConstructorSpec:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=shown,
        instance_from_str=_first,
        is_instance=_anything,
        str_from_instance=_one_word,
    )


Losses = Annotated[tuple[Any, ...], _many(_spec()), _many_specs("loss", "losses")]
"""Losses as specs."""

Loss = Annotated[Any, _one(_spec()), _one_spec("loss")]
"""One loss as a spec."""

Mitigations = Annotated[
    tuple[Any, ...], _many(_spec(_among("mitigation"))), _many_specs("mitigation", "mitigations")
]
"""Mitigations as specs."""

Reward = Annotated[Any, _one(_spec(_among("reward"))), _one_spec("reward")]
"""One reward function as a spec."""

Rewards = Annotated[tuple[Any, ...], _many(_spec(_among("reward"))), _many_specs("reward", "rewards")]
"""Reward functions as specs."""

FormatName = Annotated[str, _one(f"auto|{_among('format')}")]
"""A format of preference data."""

DiagnosticNames = Annotated[tuple[str, ...], _many(f"all|{_among('diagnostic')}")]
"""Diagnostics by name."""


def _settings(of_values: Callable[[Any], str]) -> Kind:
    def to_texts(value: Any, name: str) -> tuple[str, ...]:
        if isinstance(value, Mapping):  # columns: {chosen: better}
            value = [f"{_text(key)}={of_values(item)}" for key, item in value.items()]
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(json.dumps(item) if isinstance(item, Mapping) else _text(item) for item in items)

    return Kind("settings, each key=value, or a mapping", to_texts)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unfit
    return value


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _by_commas(value: Any) -> str:
    return ",".join(map(_json, value)) if isinstance(value, list | tuple) else _json(value)


Settings = Annotated[tuple[str, ...], _settings(_json)]
"""key=value each, or in a YAML file a mapping; a mapping in the list stays one, as JSON."""

Grid = Annotated[tuple[str, ...], _settings(_by_commas)]
"""The same with several values per key, separated by commas."""


def _device_map(value: Any, name: str) -> Any:
    if value is None or isinstance(value, str | dict):
        return value
    raise Unfit


DeviceMap = Annotated[
    Any,
    _one("auto"),
    Kind("auto, or a mapping from modules to devices", _device_map),
]
"""How transformers spreads a model over devices."""

ModelName = Annotated[str, Place.MODEL]
"""A hub id or the folder of a model or an adapter."""

DataName = Annotated[str, Place.DATA]
"""A hub id, a file or a folder of data."""

RunName = Annotated[str, Place.RUN]
"""The folder of a finished run."""
