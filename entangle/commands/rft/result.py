"""What a run over prompts leaves: shared by `entangle rft` and `entangle joint`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd

from entangle.errors import RunError
from entangle.runs.folder import RunFolder
from entangle.tables.base import Shown


@dataclass(frozen=True)
class PromptsResult(Shown):
    """A finished run over prompts.

    Args:
        run: its folder.
        prompts: one row per prompt.
        summary: aggregates of these rows.
    """

    VERB: ClassVar[str]
    """The command."""

    run: RunFolder
    prompts: pd.DataFrame
    summary: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a finished run folder.

        Raises:
            RunError: there is none of this command at `path`.
        """
        run = RunFolder.open(path, cls.VERB)
        prompts = run.table("prompts.parquet")
        if prompts is None:
            raise RunError(f"Expected one row per prompt (prompts.parquet) in {run.path}; found none.")
        return cls(run, prompts, run.read_json("summary.json"))
