"""Options from a YAML file: ours, or one of another trainer.

A file written for `trl dpo` is accepted: keys that only concern training are ignored, and named.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from entangle.config.foreign import (
    REPLACEMENTS,
    Content,
    check_loss_type,
    leave_folder,
    read_as_ours,
    sort_keys,
    take_as_several,
    take_losses,
    take_training_options,
    training_keys,
)
from entangle.config.typed import convert, shown, types_of
from entangle.errors import ConfigError

MOST_BYTES = 1_000_000
"""A larger file isn't one of options."""

MOST_VALUES = 10_000
"""A file with more values (or with a value inside itself) isn't one of options either."""


@dataclass(frozen=True)
class YamlOptions:
    """What a YAML file gave.

    Args:
        values: by our names, each of its option's type.
        ignored: keys that don't concern the command.
        notes: sentences on keys that are read otherwise than they stand there.
    """

    values: dict[str, Any] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_yaml(path: str | Path, cls: type) -> YamlOptions:
    """Read options for the dataclass `cls` from a flat YAML file, ours or TRL's.

    Raises:
        ConfigError: the file is missing or isn't a mapping, a key is known neither to us nor to TRL, or a value isn't
            of its option's type.
    """
    kinds = types_of(cls)
    found = sort_keys(load_mapping(Path(path)), kinds)
    trains = "trainer_options" in kinds
    if found.unknown:
        _check_keys(found, kinds, path)
        check_loss_type(found.unknown)
    read_as_ours(found)
    if trains:
        take_training_options(found, str(path))
        if "losses" in kinds:
            take_as_several(found)
    else:
        leave_folder(found, cls.TRAINING_FOLDER)
        if "losses" in kinds:
            take_losses(found)
    values = {key: convert(value, kinds[key], f"{path}: {key}") for key, value in found.values.items()}
    return YamlOptions(values, tuple(sorted(found.unknown)), tuple(found.notes))


def load_mapping(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, its keys texts.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    try:
        if not path.is_file():
            raise ConfigError(f"Expected a YAML file at {path}; found none.")
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path} is larger than {MOST_BYTES:,} bytes, so it isn't a file of options.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Can't read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} isn't valid YAML: {error}") from error
    try:
        content = yaml.safe_load(text)
    except Exception as error:  # broken values of known kinds raise whatever their parsing does
        raise ConfigError(f"{path} isn't valid YAML: {error}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"{path} must hold `key: value` lines; it holds {found}.")
    _check_content(content, path)
    return content


def _check_content(content: dict[Any, Any], path: Path) -> None:
    """Refuse keys that aren't names, and what is too large to be options, or holds itself."""
    count = 0
    left: list[Iterator[Any]] = [iter([content])]
    while left:
        value = next(left[-1], left)
        if value is left:
            left.pop()
            continue
        count += 1
        if count > MOST_VALUES or len(left) > 100:
            raise ConfigError(
                f"{path} holds more than options are: too many values, or values within themselves."
            )
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str) and value is content:
                    raise ConfigError(f"{path}: expected names of options as keys; got {shown(key)}.")
            left.append(iter(value.values()))
        elif isinstance(value, list):
            left.append(iter(value))


def _check_keys(found: Content, known: Collection[str], path: str | Path) -> None:
    """Refuse keys that neither we nor TRL know, all at once."""
    unexplained = sorted(set(found.unknown) - set(training_keys()) | set(found.unknown) & _foreign(found))
    if unexplained:
        raise ConfigError(
            f"{path}: unknown key {', '.join(_with_likeness(key, known) for key in unexplained)}. Known keys: "
            f"{', '.join(sorted(known))}; keys of TRL's DPOConfig, ModelConfig and ScriptArguments are accepted too."
        )


def _foreign(found: Content) -> set[str]:
    """Keys with a meaning of their own in another trainer's file, where the file is one."""
    return {"datasets"} if "base_model" in found.unknown else set()


def _with_likeness(key: str, known: Collection[str]) -> str:
    """An unknown key, and what stands for it here or may be meant."""
    if key in REPLACEMENTS:
        return f"{key!r} (here: {REPLACEMENTS[key]})"
    near = get_close_matches(key, known, n=1)
    return f"{key!r} (is {near[0]} meant?)" if near else repr(key)
