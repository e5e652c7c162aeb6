"""What tensorboard exports as CSV: a file per metric, named in the file's name."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from entangle.doctor.runs import last_run
from entangle.doctor.sources import tables
from entangle.doctor.sources.found import Found, Reader, Row, text_of

_HEADER = ["Wall time", "Step", "Value"]
_TAG = re.compile(r"^(rewards|logps|logits|completions|entangle|clip_ratio|sampling|tools)_")


def read(files: Sequence[Path]) -> Found:
    """The metrics of one run: `run-...-tag-train_rewards_chosen.csv`. Of each, the last run alone."""
    rows: list[Row] = []
    notes: dict[str, None] = {}
    for file in files:
        name = _name(file)
        values = list(csv.DictReader(text_of(file).splitlines()))
        kept, note = last_run([(int(float(row["Step"])), {name: row["Value"]}) for row in values])
        rows += [{"step": step, **row} for step, row in kept]
        notes |= {note: None} if note else {}
    return Found(rows, "tensorboard's CSV", tuple(notes)[:1])


def run_of(file: Path) -> str:
    """The run that a file's name says it is of."""
    return file.stem.rpartition("tag-")[0]


def _name(file: Path) -> str:
    tag = file.stem.rpartition("tag-")[2]
    split, _, rest = tag.partition("_")
    split, rest = (split, rest) if split in ("train", "eval") else ("train", tag)
    # tensorboard writes / as _ in the name; the names that matter have at most one
    return split + "/" + _TAG.sub(r"\1/", rest)


READER = Reader(lambda file: file.suffix == ".csv" and tables.header_of(file) == _HEADER, read)
