"""Rows of a data set from wherever it is: hub, file, folder, or memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as parquet
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from entangle.config.places import DATA_SUFFIXES, FOREIGN_SUFFIXES, is_local, require_data
from entangle.errors import DataError

Rows = Dataset | Sequence[Mapping[str, Any]]

_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def read_rows(data: Any, split: str, config: str | None) -> Rows:
    """Rows of a hub id, a path, or data in memory; see `load_pairs`.

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
        return _read_folder(path, split) if path.is_dir() else _read_file(path)
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
    try:
        data = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise DataError(
            f"Can't load the data set {name!r} (split {split!r}, config {config!r}) from the hub: "
            f"{type(error).__name__}: {error} There is no local file or folder {name!r} either. Check the "
            "name; offline, only data sets that were loaded before can be used."
        ) from error
    assert isinstance(data, Dataset)  # what a single split of a data set is, unless it streams
    return data


def _read_folder(folder: Path, split: str) -> Rows:
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
    return [row for file in chosen for row in _iterate(_read_file(file))]


def _split_name(word: str) -> str:
    return next((split for split, words in _SPLIT_WORDS.items() if word in words), word)


def _split_of(file: Path, folder: Path) -> str | None:
    """The split that a file's name, or a folder on the way to it, has as a word: `train-00000-of-00002`."""
    name = str(file.relative_to(folder).with_suffix("")).lower()
    words = set("".join(c if c.isalnum() else " " for c in name).split())
    return next((split for split, known in _SPLIT_WORDS.items() if words & known), None)


def _iterate(rows: Rows) -> Iterator[Mapping[str, Any]]:
    return (rows[i] for i in range(len(rows)))


def _read_file(path: Path) -> Rows:
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            return _json_lines(path, path.read_text(encoding="utf-8-sig"))
        if suffix == ".json":
            return _json(path)
        if suffix == ".csv":
            # texts are texts: "NA" is an answer, not a missing value
            text: Any = dict.fromkeys(("prompt", "chosen", "rejected"), str)
            frame = pd.read_csv(path, dtype=text, keep_default_na=False)
            return [{str(k): v for k, v in row.items()} for row in frame.to_dict("records")]
        if suffix == ".parquet":
            return Dataset(parquet.read_table(path))
    except (UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError, pa.ArrowException) as error:
        raise DataError(f"{path} isn't a readable {suffix} file: {error}.") from error
    except OSError as error:
        raise DataError(f"Can't read {path}: {error.strerror or error}.") from error
    raise DataError(f"Expected a {', '.join(DATA_SUFFIXES)} file; got {path}.")


def _json(path: Path) -> list[Mapping[str, Any]]:
    """A list of objects, or JSON lines under the other name, as `datasets` accepts it too."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.lstrip().startswith("["):
        return _json_lines(path, text)
    rows = _parse(text, path, 1)
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path} should be a list of objects; its entry {number} is {shortened(row)}.")
    return rows


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


def shortened(value: Any) -> str:
    """A value as an error message shows it: at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
