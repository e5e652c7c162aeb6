"""Rows that a long run writes as it goes: one parquet file per piece, named by the step at which it was written."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from entangle.errors import RunError
from entangle.runs.folder import RunFolder


class StepShards:
    """A table of a folder in pieces: `KIND/000050.parquet` holds what was found up to step 50 since the piece before.

    Every piece is written whole, so a run that is killed loses at most the piece it was at. Rows have a column `step`.

    Args:
        folder: where the table lives.
        kind: its name: `steps`, `live` or `ledger`.
    """

    def __init__(self, folder: str | Path, kind: str) -> None:
        self.kind = kind
        self._run = RunFolder(folder)
        self._path = self._run.path / kind

    @property
    def steps(self) -> list[int]:
        """Steps at which pieces were written."""
        return sorted(int(file.stem) for file in self._path.glob("[0-9]*.parquet"))

    def write(self, step: int, rows: pd.DataFrame) -> None:
        """Write one piece; a piece of the same step is replaced."""
        self._path.mkdir(parents=True, exist_ok=True)
        self._run.write_table(f"{self.kind}/{step:06d}.parquet", rows)

    def drop_after(self, step: int) -> None:
        """Delete the pieces written after `step`: a run that goes on from there writes them anew."""
        for later in self.steps:
            if later > step:
                (self._path / f"{later:06d}.parquet").unlink()

    def read(self, step: int) -> pd.DataFrame:
        """The rows of one piece."""
        return pd.read_parquet(self._path / f"{step:06d}.parquet")

    def rows(self) -> pd.DataFrame:
        """All rows so far, in the order of steps; of a run that still goes on or was killed too.

        Raises:
            RunError: there is no piece yet.
        """
        if not self.steps:
            raise RunError(f"Expected rows of a training run in {self._path}; found none.")
        return pd.concat([self.read(step) for step in self.steps], ignore_index=True)

    def join(self) -> None:
        """Write all rows as one table, `KIND.parquet`, beside the pieces."""
        if self.steps:
            self._run.write_table(f"{self.kind}.parquet", self.rows())
