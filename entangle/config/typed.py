"""Values given from outside, as the types that options are annotated with: one conversion for YAML, flags and Python.

limit: four                -> limit: expected a whole number, or nothing; got 'four'.
learning_rate: 1e-5        -> 1e-05 (YAML 1.1 reads a number without a point as text)
lora_target_modules: q     -> ("q",)
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from entangle.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """What an option takes, where its type alone doesn't say: stands in the `Annotated` of its field.

    Args:
        expected: in words, for messages.
        convert: from what was given and the option's name to the value; `Unfit` where it can't be one.
        names: what it names, where that is a spec: loss, mitigation, reward.
    """

    expected: str
    convert: Callable[[Any, str], Any]
    names: str | None = None


class Unfit(ValueError):
    """A value isn't of the type that is wanted."""


@cache
def types_of(cls: type) -> dict[str, Any]:
    """The resolved type of every field of a dataclass; Any where a class outside of the package can't be resolved."""
    names = [field.name for field in dataclasses.fields(cls)]
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError:
        hints = {}
    return {name: hints.get(name, Any) for name in names}


def convert(value: Any, kind: Any, name: str) -> Any:
    """A value as the type `kind`: lists as tuples, one thing as a tuple where there may be more, text as numbers.

    Args:
        value: what was given.
        kind: the resolved annotation.
        name: what messages call it: the option, with its file where there is one.

    Raises:
        ConfigError: it can't be one; names the option, what was expected and what came.

    Examples:
        >>> convert("1e-5", float, "learning_rate"), convert("q_proj", tuple[str, ...], "lora_target_modules")
        (1e-05, ('q_proj',))
    """
    try:
        return _fitted(value, kind, name)
    except Unfit:
        raise ConfigError(f"{name}: expected {described(kind)}; got {shown(value)}.") from None


def with_types(options: T) -> T:
    """Give every field of a frozen dataclass its type, in place: for its `__post_init__`.

    Raises:
        ConfigError: as `convert`.
    """
    for name, kind in types_of(type(options)).items():
        object.__setattr__(options, name, convert(getattr(options, name), kind, name))
    return options


def described(kind: Any) -> str:
    """A type in words.

    Examples:
        >>> described(int | None)
        'a whole number, or nothing'
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return next((k.expected for k in arguments[1:] if isinstance(k, Kind)), described(arguments[0]))
    if origin in (typing.Union, types.UnionType):
        words = [described(k) for k in arguments if k is not types.NoneType]
        return " or ".join(words) + (", or nothing" if types.NoneType in arguments else "")
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"{len(arguments)} values, each {described(arguments[0])}"
    if origin in (tuple, Sequence):
        return f"a list, each entry {described(arguments[0])}"
    return {int: "a whole number", float: "a number", str: "text", bool: "true or false"}.get(kind, str(kind))


def shown(value: Any) -> str:
    """A value in a message: what it is and how it was written, in at most a line.

    Examples:
        >>> shown(None), shown(True), shown({"a": 1})
        ('nothing (null)', 'true', "a mapping, {'a': 1}")
    """
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    text = text if len(text) <= 80 else f"{text[:77]}..."
    what = {dict: "a mapping, ", list: "a list, ", tuple: "a list, "}.get(type(value), "")
    return what + text


def _fitted(value: Any, kind: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        own = next((k for k in arguments[1:] if isinstance(k, Kind)), None)
        return _fitted(value, arguments[0], name) if own is None else own.convert(value, name)
    if origin in (typing.Union, types.UnionType):
        return _first_fit(value, arguments, name)
    if origin is Literal:
        return _require(value, isinstance(value, str | int) and value in arguments)
    if origin in (tuple, Sequence):
        return _tuple(value, arguments, name)
    if kind in _PLAIN:
        return _PLAIN[kind](value)
    return value  # Any, or a class that only its owner can judge


def _first_fit(value: Any, kinds: Sequence[Any], name: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    for kind in kinds:
        if kind is not types.NoneType:
            try:
                return _fitted(value, kind, name)
            except Unfit:
                continue
    raise Unfit


def _tuple(value: Any, arguments: Sequence[Any], name: str) -> tuple[Any, ...]:
    if value is None or isinstance(value, Mapping):
        raise Unfit
    items = tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(arguments) == 2 and arguments[1] is Ellipsis or len(arguments) == 1:
        return tuple(_fitted(item, arguments[0], name) for item in items)
    _require(items, len(items) == len(arguments))
    return tuple(_fitted(item, kind, name) for item, kind in zip(items, arguments, strict=True))


def _require(value: T, is_fit: bool) -> T:
    if not is_fit:
        raise Unfit
    return value


def _text(value: Any) -> str:
    return os.fspath(_require(value, isinstance(value, str | os.PathLike)))


def _truth(value: Any) -> bool:
    return _require(value, isinstance(value, bool))


def _number(value: Any) -> float:
    is_number = isinstance(value, int | float | str) and not isinstance(value, bool)
    try:
        number = float(_require(value, is_number))
    except (ValueError, OverflowError):
        raise Unfit from None
    _require(number, not math.isnan(number))
    return value if isinstance(value, int) else number


def _whole(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    number = _number(value)
    return int(_require(number, float(number).is_integer()))


_PLAIN: dict[Any, Callable[[Any], Any]] = {str: _text, bool: _truth, float: _number, int: _whole}
