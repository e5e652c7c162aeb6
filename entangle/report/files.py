"""The figures of a run as files. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from entangle.errors import RunError
from entangle.figures.style import save
from entangle.report.blocks import Figure
from entangle.report.sections import sections
from entangle.report.settings import knob_figures
from entangle.report.source import Source


def write_figures(sources: Sequence[Source], folder: str | Path, suffix: str) -> list[Path]:
    """Write every figure that some runs have something for.

    Args:
        sources: the runs; of several, each has a folder of its own.
        folder: where they go.
        suffix: png, svg or pdf.

    Returns:
        The files.

    Raises:
        UserError: matplotlib isn't installed.
        RunError: the folder can't be written.
    """
    written = []
    for source in sources:
        own = Path(folder) / source.name if len(sources) > 1 else Path(folder)
        try:
            own.mkdir(parents=True, exist_ok=True)
            for figure in figures(source):
                file = own / f"{figure.name}.{suffix}"
                save(figure.draw(figure.width), file)
                written.append(file)
        except OSError as error:
            raise RunError(
                f"Can't write {own}: {error.strerror or error}. Choose another --output."
            ) from error
    return written


def figures(source: Source) -> Iterator[Figure]:
    """Every figure that a run has something for, each once: those of its page, and the knobs'."""
    blocks = [block for section in sections([source]) for block in section.columns[0]]
    shown = [block for block in blocks if isinstance(block, Figure)]
    yield from {figure.name: figure for figure in (*shown, *knob_figures(source))}.values()
