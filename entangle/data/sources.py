"""Rows of a data set from wherever it is: hub, file, folder, or memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from entangle.config.places import DATA_SUFFIXES, FOREIGN_SUFFIXES, is_local, near, require_data
from entangle.data.files import decoded, read_csv
from entangle.data.formats import FORMATS
from entangle.data.hub import use_hub
from entangle.data.messages import shortened
from entangle.errors import DataError

Rows = Dataset | Sequence[Mapping[str, Any]]

_ROW = {"prompt", "chosen", "rejected", "completion"}
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def text_columns() -> set[str]:
    """Columns of a .csv file that are texts whatever stands in them: 007 isn't 7, and NA isn't missing."""
    return {"prompt", "chosen", "rejected", *(name for form in FORMATS.values() for name in form.columns)}


def columns_of(rows: Rows) -> list[str]:
    """Names of the columns, in their order."""
    if isinstance(rows, Dataset):
        return list(rows.column_names)
    return list(dict.fromkeys(name for row in rows for name in row))


def read_rows(data: Any, split: str, config: str | None, *, texts: Collection[str] = ()) -> Rows:
    """Rows of a hub id, a path, or data in memory; see `read_pairs`. In a .csv file the columns `texts` are texts too.

    Raises:
        DataError: the source isn't there or can't be read.
    """
    if isinstance(data, DatasetDict):
        return _of_dict(data, split, "the given data")
    if isinstance(data, Dataset):
        return data
    if isinstance(data, str | Path):
        require_data(data)
        if not is_local(data, (*DATA_SUFFIXES, *FOREIGN_SUFFIXES)):
            return _read_hub(str(data), split, config)
        path = Path(data).expanduser()
        texts = {*text_columns(), *texts}
        return _read_folder(path, split, texts) if path.is_dir() else _read_file(path, texts)
    if isinstance(data, Sequence) and all(isinstance(row, Mapping) for row in data):
        return data
    raise DataError(
        "Expected a hub id, a path, a datasets.Dataset or a list of dicts; got "
        f"{type(data).__name__}. (Take what you need of a stream with list(itertools.islice(stream, n)).)"
    )


def _of_dict(data: DatasetDict, split: str, source: str) -> Dataset:
    if split not in data:
        raise DataError(
            f"Expected a split {split!r} in {source}; its splits are: {', '.join(map(str, data))}."
        )
    return data[split]


def _read_hub(name: str, split: str, config: str | None) -> Dataset:
    use_hub()
    try:
        data = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"Can't load the data set {name!r} (split {split!r}, config {config!r}) from the hub: "
            f"{type(error).__name__}: {error} There is no local file or folder {name!r} either.{near(name)} Check the "
            "name; offline, only data sets that were loaded before can be used."
        ) from error
    assert isinstance(data, Dataset)  # what a single split of a data set is, unless it streams
    return data


def _read_folder(folder: Path, split: str, texts: Collection[str]) -> Rows:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            data = load_from_disk(str(folder))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{folder} looks like a save_to_disk folder but can't be read: {error}."
            ) from error
        return _of_dict(data, split, str(folder)) if isinstance(data, DatasetDict) else data
    files = sorted(
        file for file in folder.rglob("*") if file.suffix.lower() in DATA_SUFFIXES and file.is_file()
    )
    # dataset_infos.json and the like describe a data set; they aren't part of it
    files = [file for file in files if not file.name.startswith((".", "dataset_info"))]
    chosen = [file for file in files if _split_of(file, folder) == _split_name(split)]
    if not chosen and split == "train":
        chosen = [file for file in files if _split_of(file, folder) is None]
    if not chosen:
        there = ", ".join(str(file.relative_to(folder)) for file in files[:10]) or "none"
        raise DataError(
            f"Expected {', '.join(DATA_SUFFIXES)} files of the split {split!r} (with that word in their name) or "
            f"a save_to_disk data set in {folder}; files there: {there}."
        )
    return [row for file in chosen for row in _iterate(_read_file(file, texts))]


def _split_name(word: str) -> str:
    return next((split for split, words in _SPLIT_WORDS.items() if word in words), word)


def _split_of(file: Path, folder: Path) -> str | None:
    """The split that a file's name, or a folder on the way to it, has as a word: `train-00000-of-00002`."""
    name = str(file.relative_to(folder).with_suffix("")).lower()
    words = set("".join(c if c.isalnum() else " " for c in name).split())
    return next((split for split, known in _SPLIT_WORDS.items() if words & known), None)


def _iterate(rows: Rows) -> Iterator[Mapping[str, Any]]:
    return (rows[i] for i in range(len(rows)))


def _read_file(path: Path, texts: Collection[str]) -> Rows:
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            return _json_lines(path, decoded(path))
        if suffix == ".json":
            return _json(path)
        if suffix == ".csv":
            return read_csv(path, texts)
        if suffix == ".parquet":
            return Dataset(parquet.read_table(path))
        if suffix == ".arrow":
            return Dataset.from_file(str(path))
    except (pd.errors.ParserError, pd.errors.EmptyDataError, pa.ArrowException) as error:
        raise DataError(f"{path} isn't a readable {suffix} file: {error}.") from error
    except OSError as error:
        raise DataError(f"Can't read {path}: {error.strerror or error}.") from error
    raise DataError(f"Expected a {', '.join(DATA_SUFFIXES)} file; got {path}.")


def _json(path: Path) -> list[Mapping[str, Any]]:
    """A list of objects, or JSON lines under the other name, as `datasets` accepts it too."""
    text = decoded(path)
    if not text.lstrip().startswith("["):
        return _json_object(path, text)
    rows = _parse(text, path, 1)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path} should be a list of objects; its entry {number} is {shortened(row)}.")
    return rows


def _json_object(path: Path, text: str) -> list[Mapping[str, Any]]:
    """JSON lines; one object that holds the whole table is refused, with the way to rows."""
    try:
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return _json_lines(path, text)
    if not isinstance(whole, dict) or not whole:
        return _json_lines(path, text)
    for name, inner in whole.items():
        if isinstance(inner, list) and inner and isinstance(inner[0], dict) and _ROW & set(inner[0]):
            raise DataError(
                f"{path} holds one object whose {shortened(name)} is the list of rows. Keep that list alone: "
                f"jq '.[\"{name}\"]' {path.name}"
            )
    if all(isinstance(value, dict) and "0" in value for value in whole.values()) or all(
        isinstance(value, list) and value and isinstance(value[0], str) for value in whole.values()
    ):
        raise DataError(
            f"{path} holds one object of columns. Write a row per line, in Python: "
            f"pd.read_json({path.name!r}).to_json('pairs.jsonl', orient='records', lines=True)."
        )
    return [whole]


def _json_lines(path: Path, text: str) -> list[Mapping[str, Any]]:
    rows = []
    for number, line in enumerate(
        text.split("\n"), start=1
    ):  # splitlines would cut at U+2028 inside a string
        if not line.strip():
            continue
        row = _parse(line, path, number)
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: expected a JSON object; got {shortened(row)}.")
        rows.append(row)
    return rows


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise DataError(
            f"{path}, line {line}, column {error.colno}: not valid JSON ({error.msg}). Expected one object "
            "per line (.jsonl), or a list of objects (.json)."
        ) from None
    except RecursionError:
        raise DataError(f"{path}, line {first_line}: the JSON is nested too deep to be a pair.") from None
