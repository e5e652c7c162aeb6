"""What a what-if reads of a probe, wherever the probe is: in memory, in a run folder, or a table of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pandas as pd

from entangle.config import ProbeConfig
from entangle.measure.reload import recorded_options
from entangle.runs.folder import RunFolder


class Probed(Protocol):
    """A finished probe, as far as a what-if reads it."""

    @property
    def pairs(self) -> pd.DataFrame:
        """One row per pair."""
        ...

    @property
    def loss_batch_size(self) -> int:
        """Pairs per batch for batch-coupled losses."""
        ...

    @property
    def provenance(self) -> Mapping[str, Any]:
        """What the numbers were computed from."""
        ...

    @property
    def texts(self) -> pd.DataFrame | None:
        """Texts of the pairs, where they were kept."""
        ...

    @property
    def set_content(self) -> Mapping[str, Any] | None:
        """The set's block (see `entangle.measure.set_content`), where there is one."""
        ...


@dataclass(frozen=True)
class ProbedRows:
    """See `Probed`; rows alone are enough."""

    pairs: pd.DataFrame
    loss_batch_size: int = ProbeConfig.loss_batch_size
    provenance: Mapping[str, Any] = field(default_factory=dict)
    texts: pd.DataFrame | None = None
    set_content: Mapping[str, Any] | None = None

    @classmethod
    def of_run(cls, path: str | Path) -> ProbedRows:
        """From a probe's finished run folder.

        Raises:
            RunError: there is none at `path`, or a file of it is damaged.
        """
        run = RunFolder.open(path, ProbeConfig.VERB)
        pairs = run.pairs()
        return cls(
            pairs=pairs,
            loss_batch_size=recorded_options(run).loss_batch_size,
            provenance=_json(run, "provenance.json") or {},
            texts=run.table("texts.parquet"),
            set_content=_json(run, "set.json"),
        )


def _json(run: RunFolder, name: str) -> dict[str, Any] | None:
    return run.read_json(name) if (run.path / name).is_file() else None


def read_probe(probe: Probed | RunFolder | str | Path | pd.DataFrame) -> Probed:
    """What a what-if reads of any of these."""
    if isinstance(probe, pd.DataFrame):
        return ProbedRows(probe)
    if isinstance(probe, RunFolder | str | Path):
        return ProbedRows.of_run(probe.path if isinstance(probe, RunFolder) else probe)
    return probe
