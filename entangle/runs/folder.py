"""The run folder: what every command writes and reads, and nothing else passes between commands.

config.yaml           the resolved options; the command replays from it
provenance.json       what the numbers were computed from and on
pairs/00000.parquet   one row per pair, in shards written whole
texts.parquet         the texts of the pairs (left out with --save_text false)
predictions.parquet   one row per pair and loss
summary.json          the aggregates, each recomputable from the rows
checksums.json        what the finished run wrote, so that a damaged file is named and not read
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from entangle.config.files import load_mapping
from entangle.config.places import require_run
from entangle.errors import RunError, UserError
from entangle.runs.atomic import replacing
from entangle.runs.integrity import (
    CHECKSUMS,
    Damaged,
    checksums_of,
    digest,
    listed_in,
    parse_json,
    parse_table,
    read_checked,
)

if TYPE_CHECKING:
    from entangle.config import RecordedOptions, Replaced

MADE_BY = "# entangle "
"""Beginning of a config.yaml, followed by the command that the run is of."""


class RunFolder:
    """One run's folder. Every file is written under a temporary name and renamed, so none is ever half there."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    @classmethod
    def open(cls, path: str | Path, verb: str | None = None) -> RunFolder:
        """An existing, finished run.

        Args:
            path: its folder.
            verb: the command that it must be of; None for any.

        Raises:
            RunError: there is no run at `path`, it isn't finished, or it is of another command.
        """
        run = cls(path)
        require_run(run.path)
        if verb is not None and run.verb not in {None, verb}:
            raise RunError(
                f"Expected a run of entangle {verb} at {run.path}; it holds one of entangle {run.verb}."
            )
        if not run.is_complete:
            raise RunError(
                f"The run in {run.path} isn't finished (it has no summary.json). "
                f"Finish it with: {run.resume_command}"
            )
        return run

    def begin(
        self, config: RecordedOptions, identity: Mapping[str, Any], *, replaces: Replaced = "nothing"
    ) -> None:
        """Make the folder, or resume the same run in it.

        Args:
            config: the options.
            identity: hashes of model, adapter, tokenizer and data; a resumed run must have the same.
            replaces: which run is deleted if it is already there.

        Raises:
            RunError: the folder holds another run or foreign files, or can't be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(
                f"Expected a folder at {self.path}, or nothing; it is a file. Choose another --output_dir."
            )
        with self._writing():
            if (self.path / "config.yaml").is_file() and (
                replaces == "any" or (replaces == "another" and not self._is_same(config, identity))
            ):
                shutil.rmtree(self.path)
            if self.path.is_dir() and not all(map(_is_left_behind, self.path.iterdir())):
                self._check_same_run(config, identity)
            else:
                self.path.mkdir(parents=True, exist_ok=True)
                self.write_json("identity.json", identity)
                self.record(config)

    def record(self, config: RecordedOptions) -> None:
        """Write down the options that the run is of.

        Raises:
            RunError: the folder can't be written.
        """
        self.write_yaml("config.yaml", config.recorded, head=f"{MADE_BY}{config.VERB}\n")

    def differs_only_in(
        self, options: Sequence[str], config: RecordedOptions, identity: Mapping[str, Any]
    ) -> bool:
        """Whether the folder holds a finished run of the same inputs that differs in some of these options alone.

        Args:
            options: their names.
            config: the options asked for.
            identity: hashes of the inputs asked for.
        """
        if not self.is_complete or not (self.path / "config.yaml").is_file() or self.verb != config.VERB:
            return False
        try:
            changed, inputs = self.changed_options(config), self.read_json("identity.json")
        except UserError:  # illegible: whoever begins the run says so
            return False
        return bool(changed) and changed.keys() <= set(options) and not _changes(inputs, _plain(identity))

    def _is_same(self, config: RecordedOptions, identity: Mapping[str, Any]) -> bool:
        """Whether the folder holds this run, and says so legibly."""
        try:
            self._check_same_run(config, identity)
        except UserError:
            return False
        return True

    def _check_same_run(self, config: RecordedOptions, identity: Mapping[str, Any]) -> None:
        advice = "Choose another --output_dir, or give --overwrite to replace it."
        if not (self.path / "config.yaml").is_file() or not (self.path / "identity.json").is_file():
            raise RunError(
                f"{self.path} isn't empty and holds no run of entangle, so it stays. Choose another --output_dir."
            )
        for name, changed in (
            ("option", self.changed_options(config)),
            ("input", _changes(self.read_json("identity.json"), _plain(identity))),
        ):
            if changed:
                pairs = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in changed.items())
                raise RunError(f"{self.path} holds another run ({name} {pairs}). {advice}")

    def changed_options(self, config: RecordedOptions) -> dict[str, tuple[Any, Any]]:
        """Options with another value than the run was started with, as (there, now).

        An option that the run's record lacks was added to the command since; the run had its default.
        """
        now = _plain(config.recorded)
        return _changes({name: _plain(config.defaults[name]) for name in now} | self.config, now)

    @property
    def config(self) -> dict[str, Any]:
        """The options that the run was started with."""
        return load_mapping(self.path / "config.yaml")

    @property
    def verb(self) -> str | None:
        """The command that the run is of; None where its record doesn't say."""
        with (self.path / "config.yaml").open(encoding="utf-8", errors="replace") as file:
            first = file.readline(200).rstrip()
        return first.removeprefix(MADE_BY) if first.startswith(MADE_BY) else None

    @property
    def resume_command(self) -> str:
        """What to type to resume the run."""
        return self.command_from_record(self.verb or "VERB", ("--output_dir", str(self.path)))

    def command_from_record(self, verb: str, place: Sequence[str]) -> str:
        """What to type to give a command the options that are recorded here.

        Args:
            verb: the command.
            place: the words that name its folder.
        """
        return shlex.join(["entangle", verb, "--config", str(self.path / "config.yaml"), *place])

    @property
    def is_complete(self) -> bool:
        """Whether the run has finished: its summary is written last."""
        return (self.path / "summary.json").is_file()

    def shards_of(self, folder: str) -> list[int]:
        """Numbers of the shards of a table that are finished."""
        return sorted(int(file.stem) for file in (self.path / folder).glob("[0-9]*.parquet"))

    def write_shard(self, folder: str, number: int, rows: pd.DataFrame) -> None:
        """Write one finished shard of a table."""
        self.write_table(f"{folder}/{number:05d}.parquet", rows)

    def read_shards(self, folder: str) -> pd.DataFrame:
        """The rows of all finished shards of a table, in dataset order; empty where there is none.

        Raises:
            RunError: one is damaged, or gone since the run has finished.
        """
        names = {f"{folder}/{number:05d}.parquet" for number in self.shards_of(folder)}
        with self._reading(CHECKSUMS):
            names |= {name for name in listed_in(self.path) if name.startswith(f"{folder}/")}
        shards = [self.read_table(name) for name in sorted(names)]
        if not shards:
            return pd.DataFrame()
        with self._reading(f"{folder}/*.parquet"):
            if not all("index" in shard for shard in shards):
                raise Damaged("a shard lacks the column index")
        return joined(shards)

    def read_table(self, name: str, columns: list[str] | None = None) -> pd.DataFrame:
        """Read a table of the folder by file name, or some of its columns.

        Raises:
            RunError: it is damaged or gone.
        """
        with self._reading(name):
            return parse_table(read_checked(self.path, name), columns)

    def write_table(self, name: str, rows: pd.DataFrame) -> None:
        """Write a table as parquet."""
        with self._replacing(name) as temporary:
            rows.to_parquet(temporary, index=False)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file; a number that isn't finite becomes null. The summary finishes the run."""
        text = json.dumps(as_json(content), indent=2, ensure_ascii=False) + "\n"
        if name == "summary.json":
            written = checksums_of(self.path) | {name: digest(text.encode("utf-8"))}
            self._write_text(CHECKSUMS, json.dumps(written, indent=2) + "\n")
        self._write_text(name, text)

    def write_yaml(self, name: str, content: Mapping[str, Any], head: str = "") -> None:
        """Write a YAML file that `yaml.safe_load` reads back, below a `head` of comments."""
        with self._replacing(name) as temporary:
            temporary.write_text(head + yaml.safe_dump(_plain(content), sort_keys=False), encoding="utf-8")

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON file of the folder.

        Raises:
            RunError: it is damaged or gone.
        """
        with self._reading(name):
            return parse_json(read_checked(self.path, name))

    def pairs(self) -> pd.DataFrame:
        """All rows of the finished shards, in dataset order.

        Raises:
            RunError: there are none.
        """
        rows = self.read_shards("pairs")
        if rows.empty:
            raise RunError(
                f"Expected a probe's run folder (with pairs/*.parquet) at {self.path}; it holds no pairs."
            )
        return rows

    def table(self, name: str) -> pd.DataFrame | None:
        """A table of the folder by file name, or None where the run has none."""
        with self._reading(CHECKSUMS):
            is_listed = name in listed_in(self.path)
        return self.read_table(name) if is_listed or (self.path / name).is_file() else None

    def _write_text(self, name: str, text: str) -> None:
        with self._replacing(name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        """A temporary path beside `name` that becomes `name` when the block ends well, and goes otherwise."""
        target = self.path / name
        with self._writing():
            target.parent.mkdir(exist_ok=True)
            with replacing(target) as temporary:
                yield temporary
                self._note_change(name, temporary)

    def _note_change(self, name: str, file: Path) -> None:
        """Keep the checksums of a finished run true while something is added to it, or replaced."""
        if name in (CHECKSUMS, "summary.json") or not name.endswith((".json", ".parquet")):
            return
        with self._reading(CHECKSUMS):
            listed = listed_in(self.path)
        if listed:
            self._write_text(
                CHECKSUMS, json.dumps(listed | {name: digest(file.read_bytes())}, indent=2) + "\n"
            )

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        """Say which file is damaged, and how to make it again."""
        try:
            yield
        except Damaged as error:
            raise RunError(f"{self.path / name} is damaged: {error}. {self._remedy(name)}") from None

    def _remedy(self, name: str) -> str:
        if name == CHECKSUMS:
            return "Delete it: the other files are then read unchecked."
        if name == "tokens.parquet" or name.startswith("across."):
            return f"Make it again: {shlex.join(['entangle', name.partition('.')[0], str(self.path)])}"
        if self.verb is None:
            return "Make it again with the command that made it."
        if (self.path / "modules.parquet").is_file() or name in ("identity.json", "modules.parquet"):
            return f"Make the run again: {self.resume_command} --overwrite"
        return f"Delete it and summary.json, and resume the run: {self.resume_command}"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"Can't write the run folder {self.path}: {error.strerror or error}. What was finished is kept; "
                "free some space or choose another --output_dir, and run the same command again to resume."
            ) from error


def as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """What reading `content` back from a JSON file of a run would give: a number that isn't finite is None."""
    return _finite(_plain(content))


def joined(shards: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The rows of a table's shards in dataset order."""
    return pd.concat(shards, ignore_index=True).sort_values("index", ignore_index=True, kind="stable")


def _is_left_behind(entry: Path) -> bool:
    """Whether a file is all that there is of a run that was killed before its options were recorded."""
    return entry.name == "identity.json" or (entry.name.startswith(".") and entry.name.endswith(".tmp"))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs, by key: (old, new)."""
    return {k: (old.get(k), new.get(k)) for k in sorted({*old, *new}) if old.get(k) != new.get(k)}


def _plain(content: Any) -> Any:
    """Tuples and paths as YAML and JSON know them."""
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return str(content) if isinstance(content, Path) else content


def _finite(content: Any) -> Any:
    """The same with null for every number that isn't finite."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content
