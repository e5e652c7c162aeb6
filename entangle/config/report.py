"""Options of `entangle report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from entangle.config.base import Options


@dataclass(frozen=True)
class ReportConfig(Options):
    """Finished runs as one self-contained HTML page, as a section of a README, or their figures as files."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run folders; several are shown side by side."""
    output: Annotated[str | None, tyro.conf.arg(aliases=["--output_dir"])] = None
    """File (html) or folder (card, figures) that is written; by default report.html, card or figures in the first run
    folder."""
    format: Literal["html", "card", "png", "svg", "pdf"] = "html"
    """`html`: one page that works without a network. `card`: a section of a model's README, card.md, with its figures
    beside it. Otherwise every figure as a file of this kind."""

    @property
    def output_path(self) -> Path:
        """The file or folder that is written."""
        if self.output is None:
            return Path(self.runs[0]) / {"html": "report.html", "card": "card"}.get(self.format, "figures")
        is_page_in_folder = self.format == "html" and (
            Path(self.output).is_dir() or not Path(self.output).suffix
        )
        return Path(self.output) / "report.html" if is_page_in_folder else Path(self.output)
