"""Options of a command from what was typed: a YAML file first, then flags over it."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import tyro

from entangle.config.base import EMBEDDED
from entangle.config.declared import known_losses
from entangle.config.files import YamlOptions, read_yaml
from entangle.config.given import check_inputs, named_flags
from entangle.config.objects import build_losses
from entangle.config.places import Place
from entangle.config.specs import own_code, unknown_name
from entangle.config.typed import Kind, types_of
from entangle.errors import ConfigError

Config = TypeVar("Config")


def parse(cls: type[Config], arguments: Sequence[str], *, prog: str) -> tuple[Config, tuple[str, ...]]:
    """Options of a command from its arguments: `--config FILE` (or FILE.yaml as the first word), then flags over it.

    Returns:
        The options, and sentences on what of the file is ignored or read otherwise than it stands there.

    Raises:
        ConfigError: the file or a value can't be used. A flag that can't be parsed exits with status 2.
    """
    arguments = list(arguments)
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments.insert(0, "--config")
    if arguments and not arguments[0].startswith("-") and not _takes_words(cls):
        raise ConfigError(
            f"Expected options or a .yaml file first; got {arguments[0]!r}. Data is named by --dataset_name, a "
            "model by --model_name_or_path, and a run is resumed by --config RUN/config.yaml --output_dir RUN."
        )
    loaded = YamlOptions()
    if "--config" in arguments:
        place = arguments.index("--config")
        if place + 1 == len(arguments):
            raise ConfigError("--config needs a file name.")
        file = arguments[place + 1]
        loaded = read_yaml(file, cls)
        del arguments[place : place + 2]
        default = _from_file(file, cls, loaded.values)
    else:
        default = cls()
    config = tyro.cli(
        cls,
        prog=prog,
        description=f"{cls.__doc__}\n\nOptions may stand in a YAML file: --config FILE.",
        args=arguments,
        default=default,
        use_underscores=True,
    )
    check_inputs(config, {*loaded.values, *named_flags(arguments)})
    notes = list(loaded.notes)
    if loaded.ignored:
        notes.append(f"Ignored, since they don't concern this command: {', '.join(loaded.ignored)}.")
    if own := own_code([_specs(config, what) for what in ("loss", "mitigation", "reward")]):
        notes.append(f"Code of your own is run: {', '.join(dict.fromkeys(own))}.")
    return config, tuple(notes)


def check_names(config: Any, command: str) -> None:
    """Refuse losses that aren't known and paths where nothing is, before anything heavy is imported.

    Args:
        config: the options.
        command: whose they are.

    Raises:
        UserError: the first of them.
    """
    kinds = types_of(type(config))
    losses = _specs(config, "loss")
    known = known_losses()
    for spec in losses:
        name = spec if isinstance(spec, str) else spec["name"]
        if name not in known and ":" not in name:
            meant = {theirs: ours for ours, theirs in reversed(known.items()) if theirs}
            raise ConfigError(unknown_name(name, known, "loss", meant))
    for name, kind in kinds.items():
        for place in _places(kind):
            given = getattr(config, name)
            if given == "" and place is Place.RUN:
                raise ConfigError(
                    f"expected the run folder of a finished probe: entangle {command} RUN. Got none."
                )
            if given and given != EMBEDDED:
                place.require(given)
    if not all(isinstance(spec, str) and spec in known for spec in losses):
        build_losses(losses)  # waits for torch, but for nothing else


def _from_file(file: str, cls: type[Config], values: dict[str, Any]) -> Config:
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def _takes_words(cls: type) -> bool:
    return any(mark is tyro.conf.Positional for kind in types_of(cls).values() for mark in _marks(kind))


def _marks(kind: Any) -> tuple[Any, ...]:
    """The metadata of an annotation, and of the kinds that it is a union of."""
    inner = typing.get_args(kind)
    own = getattr(kind, "__metadata__", ())
    return (*own, *(mark for part in inner for mark in _marks(part)))


def _places(kind: Any) -> list[Place]:
    return [mark for mark in _marks(kind) if isinstance(mark, Place)]


def _specs(config: Any, what: str) -> list[Any]:
    """The losses (or what else is asked for) that options name."""
    kinds = types_of(type(config))
    named = [
        name
        for name, kind in kinds.items()
        if any(isinstance(m, Kind) and m.names == what for m in _marks(kind))
    ]
    given = [getattr(config, name) for name in named]
    return [spec for one in given for spec in (one if isinstance(one, tuple) else (one,)) if spec is not None]
