"""How losses, mitigations and reward functions are written, and the one way from what was written to an object.

    dpo                        a name
    dpop:penalty=5,beta=0.2    a name and options
    {name: dpop, penalty: 5}   the same in a YAML file
    my_losses:CubicHinge       MODULE:NAME, code of the user's own, options after a further colon

A spec is such a text without options, or a mapping with `name`: what options hold and run folders record.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args, get_origin, runtime_checkable

import yaml

from entangle.config.typed import convert, shown, types_of
from entangle.errors import ConfigError, UserError

Spec = str | dict[str, Any]
T = TypeVar("T")

_OWN = re.compile(r"([A-Za-z_][\w.]*:[A-Za-z_]\w*)(?::(.*))?", re.DOTALL)
"""MODULE:NAME, perhaps with options."""


@runtime_checkable
class Configured(Protocol):
    """An object that a spec can stand for: a dataclass with a name."""

    name: Any

    @property
    def config(self) -> Mapping[str, Any]:
        """Its name and its options."""
        ...


def parse_spec(text: str, what: str = "loss") -> Spec:
    """A spec from the text of a flag: `dpo` as it is, `dpop:penalty=5,beta=0.2` as a mapping.

    Args:
        text: the text.
        what: what it names, for messages.

    Raises:
        ConfigError: an option isn't of the form key=value.

    Examples:
        >>> parse_spec("dpop:penalty=5,beta=0.2")
        {'name': 'dpop', 'penalty': 5, 'beta': 0.2}
        >>> parse_spec("my_losses:CubicHinge:beta=0.2")
        {'name': 'my_losses:CubicHinge', 'beta': 0.2}
    """
    text = text.strip()
    if text.startswith("{"):
        return to_spec(read_value(text), what)
    own = _OWN.fullmatch(text)
    name, options = (own[1], own[2] or "") if own else _halves(text, ":")
    spec: dict[str, Any] = {"name": name.strip()}
    for option in filter(None, re.split(r",(?![^\[{]*[\]}])", options)):
        key, value = _halves(option, "=")
        if "=" not in option or not key.strip():
            raise ConfigError(malformed(text, what))
        spec[key.strip()] = read_value(value)
    return spec if len(spec) > 1 else spec["name"]


def spec_text(spec: Spec) -> str:
    """A spec as it may be typed.

    Examples:
        >>> spec_text({"name": "dpop", "penalty": 5})
        'dpop:penalty=5'
    """
    if isinstance(spec, str):
        return spec
    options = ",".join(f"{key}={_as_text(value)}" for key, value in spec.items() if key != "name")
    return f"{spec['name']}:{options}" if options else spec["name"]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


_EXAMPLES = {
    "loss": ("dpo:beta=0.05", ", or as module:Class of your own code"),
    "reward": ("length:most=20", ", or as module:function of your own code"),
    "mitigation": ("sequential:order=random", ", or as module:Class of your own code"),
}
"""By what is named: an example, and how code of the user's own is named where it may be."""


def malformed(text: str, what: str) -> str:
    """The message on a spec that can't be read."""
    example, own = _EXAMPLES[what]
    return (
        f"A {what} is given as name or name:key=value,key=value (for instance {example}){own}; got {text!r}."
    )


def to_spec(value: Any, what: str = "loss") -> Spec:
    """The spec of whatever names a loss, mitigation or reward function: a text, a mapping, or the object itself.

    An object keeps its name and all its fields. A class of the user's own goes by module:Class where it can be imported
    again, so that a record of it replays.

    Raises:
        ConfigError: it is none of these.

    Examples:
        >>> from losses import DPO
        >>> to_spec(DPO(beta=0.5))
        {'name': 'dpo', 'beta': 0.5}
    """
    if isinstance(value, str) and value.strip():
        return _replayable(parse_spec(value, what), what)
    if isinstance(value, Configured) and is_dataclass(value):
        return _plain(value)
    if (
        isinstance(value, Mapping)
        and isinstance(value.get("name"), str)
        and all(isinstance(k, str) for k in value)
    ):
        return _replayable({key: _plain(option) for key, option in value.items()}, what)
    raise ConfigError(
        f"Expected a {what} as name, name:key=value,... or a mapping with `name`; got {shown(value)}."
    )


def own_code(spec: Any) -> list[str]:
    """The `module:Name`s in a spec: code of the user's own that will be run."""
    if isinstance(spec, str):
        return [spec] if _OWN.fullmatch(spec) else []
    if isinstance(spec, Mapping):
        return [name for value in spec.values() for name in own_code(value)]
    return [name for item in spec for name in own_code(item)] if isinstance(spec, list | tuple) else []


def construct(spec: Any, registry: Mapping[str, type[T]], base: type[T], what: str) -> T:
    """The object that a spec stands for; one that is an object already is returned.

    Args:
        spec: see `to_spec`.
        registry: classes by name.
        base: their common class.
        what: what they are, for messages.

    Raises:
        ConfigError: the name or an option isn't known, or its value is of another type or makes no sense.
    """
    if isinstance(spec, base):
        return spec
    spec = to_spec(spec, what)
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name")
    cls = registry.get(name) or _own_class(name, registry, base, what)
    kinds = types_of(cls)
    unknown = [key for key in options if key not in kinds]
    if unknown:
        hyper = "hyper-parameter" if what == "loss" else "option"
        raise ConfigError(
            f"Unknown {hyper} {', '.join(map(repr, sorted(unknown)))} of {what} {name!r}. "
            f"It has: {', '.join(kinds) or 'none'}."
        )
    values = {
        key: _option(value, kinds[key], f"{what} {name}: {key}", registry, base, what)
        for key, value in options.items()
    }
    try:
        return cls(**values)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def import_own(name: str, what: str) -> Any:
    """What `module:Name` names, from a module that is also looked for in the working folder. Its code is run.

    Raises:
        ConfigError: there is no such module or name, or the module fails.
    """
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module does on being imported
        raise ConfigError(
            f"Can't find the {what} {name!r}: {type(error).__name__}: {error}. The module is looked for where Python "
            f"looks, and in the working folder {Path.cwd()}."
        ) from error


def read_value(text: str) -> Any:
    """A value given as text: JSON, or else YAML (in which 1e-5 would be text).

    Raises:
        ConfigError: it is neither.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return yaml.safe_load(text)
    except Exception as error:  # broken values of known kinds raise whatever their parsing does
        raise ConfigError(f"Expected a value as JSON or YAML has it; got {text[:80]!r}.") from error


def unknown_name(
    name: str, known: Mapping[str, Any], what: str, meant: Mapping[str, str] | None = None
) -> str:
    """The message on a name that isn't known, with the one that may be meant.

    Args:
        name: what was given.
        known: the known names.
        what: what they name.
        meant: other projects' names, with ours.
    """
    plural = f"{what}es" if what.endswith("s") else f"{what}s"
    if name in (meant or {}):
        guess = f" TRL's {name} is {(meant or {})[name]} here."
    else:
        close = get_close_matches(name, known, 1)
        guess = f" Did you mean {close[0]}?" if close else ""
    return f"Unknown {what} {name!r}.{guess} Known {plural}: {', '.join(sorted(known))}{_EXAMPLES[what][1]}."


def _option(
    value: Any, kind: Any, name: str, registry: Mapping[str, type[T]], base: type[T], what: str
) -> Any:
    """One option of an object: a part of the same family is built, everything else converted."""
    if kind is base:
        return construct(value, registry, base, what)
    if get_args(kind) == (base,) and get_origin(kind) is not None:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(construct(item, registry, base, what) for item in items)
    return convert(value, kind, name)


def _own_class(name: str, registry: Mapping[str, type[T]], base: type[T], what: str) -> type[T]:
    module = name.partition(":")[0]
    if module in registry and registry[module].__module__ != module:  # dpo:beta
        raise ConfigError(malformed(name, what))
    if ":" not in name:
        raise ConfigError(unknown_name(name, registry, what, by_trl_name(registry)))
    cls = import_own(name, what)
    if not (isinstance(cls, type) and issubclass(cls, base) and is_dataclass(cls)):
        raise ConfigError(
            f"Expected {name} to be a class derived from {base.__module__.partition('.')[0]}.{base.__name__} and "
            f"registered; it is {shown(cls)}."
        )
    return cls


def by_trl_name(registry: Mapping[str, type]) -> dict[str, str]:
    """Our names by TRL's, for classes that say theirs; the first of several."""
    found: dict[str, str] = {}
    for ours, cls in registry.items():
        theirs = getattr(cls, "trl", None)
        if theirs and theirs not in registry:
            found.setdefault(theirs, ours)
    return found


def _plain(value: Any) -> Any:
    """Objects in the options of an object as specs, everything else as it is."""
    if isinstance(value, Configured) and is_dataclass(value):
        return {"name": _name_of(type(value))} | {
            f.name: _plain(getattr(value, f.name)) for f in fields(value)
        }
    if isinstance(value, Mapping):
        return {key: _plain(option) for key, option in value.items()}
    return type(value)(map(_plain, value)) if isinstance(value, list | tuple) else value


def _replayable(spec: Spec, what: str) -> Spec:
    """The same spec; a loss that the user's own module has registered goes by module:Class."""
    losses = sys.modules.get("losses")
    name = spec if isinstance(spec, str) else spec["name"]
    cls = losses.CATALOGUE.get(name) if losses is not None and what == "loss" else None
    if cls is None or _name_of(cls) == name:
        return spec
    return _name_of(cls) if isinstance(spec, str) else spec | {"name": _name_of(cls)}


def _name_of(cls: Any) -> str:
    """The name that a record gives a class: its own, or module:Class where it is the user's and can be imported."""
    is_ours = cls.__module__.partition(".")[0] in ("losses", "entangle")
    module = sys.modules.get(cls.__module__)
    if is_ours or cls.__module__ == "__main__" or getattr(module, cls.__qualname__, None) is not cls:
        return cls.name
    return f"{cls.__module__}:{cls.__qualname__}"


def _halves(text: str, mark: str) -> tuple[str, str]:
    first, _, second = text.partition(mark)
    return first, second
