"""A section for a model's README on the hub: the verdict, the drift with its interval, what it rests on, figures.

Markdown with its figures beside it. What comes from data or from file names is escaped, so that it is shown as text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from entangle.errors import RunError
from entangle.figures.style import save
from entangle.report.blocks import Block, Figure, Table
from entangle.report.sections import sections
from entangle.report.source import Source
from entangle.report.verdict import verdict
from entangle.runs.atomic import replacing

SHOWN = ("set", "regimes", "training", "comparison", "rewards")
"""Sections of the page whose first figure a card shows."""

FOLDER = "entanglement"
"""Where a card's figures are, beside it."""

_FACTS = (
    ("model", "model_name_or_path"),
    ("adapter", "adapter_name_or_path"),
    ("reference", "reference"),
    ("probed parameters", "probed_parameters"),
    ("precision of scores", "score_dtype"),
    ("metric", "metric"),
    ("entangle", "entangle"),
)
"""Names and keys of what the numbers were computed from and on."""

_SPECIAL = re.compile(r"[\\`*_\[\]<>|~&$@]|:(?=//)|^[#+=-]|(?<=^\d)[.)]")
"""What means something in Markdown: anywhere, before an address, at the beginning of a line."""


def write_card(sources: Sequence[Source], folder: str | Path) -> list[Path]:
    """Write `card.md` and its figures.

    Args:
        sources: the runs, one under the other.
        folder: where they go; the figures into a folder of their own in it.

    Returns:
        The files.

    Raises:
        UserError: matplotlib isn't installed.
        RunError: the folder can't be written.
    """
    card, written = Path(folder) / "card.md", []
    try:
        (card.parent / FOLDER).mkdir(parents=True, exist_ok=True)
        for number, source in enumerate(sources):
            for figure in _figures(source):
                file = card.parent / _file(figure, number)
                save(figure.draw(figure.width), file)
                written.append(file)
        with replacing(card) as temporary:
            temporary.write_text(render_card(sources), encoding="utf-8")
    except OSError as error:
        raise RunError(
            f"Can't write {card.parent}: {error.strerror or error}. Choose another --output."
        ) from error
    return [card, *written]


def render_card(sources: Sequence[Source]) -> str:
    """The section as Markdown."""
    lines = ["## Gradient entanglement", ""]
    for number, source in enumerate(sources):
        if len(sources) > 1:
            lines += [f"### {escape(source.name)}", ""]
        main, *others = verdict(source)
        lines += [f"**{escape(main)}**", "", *(f"- {escape(sentence)}" for sentence in others), ""]
        facts = [[name, value] for name, value in _facts(source)]
        lines += [*_rows(["measured", ""], facts), ""]
        for figure in _figures(source):
            lines += [
                f"![{escape(figure.alt)}]({_file(figure, number)})",
                "",
                f"*{escape(figure.caption)}*",
                "",
            ]
            if figure.table is not None:
                lines += [*_table(figure.table), ""]
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    r"""A text that Markdown shows as it stands, in one line.

    >>> escape("a|b <b>_x_</b>\n[1](y)")
    'a\\|b \\<b\\>\\_x\\_\\</b\\> \\[1\\](y)'
    """
    printable = "".join(c if c.isprintable() else " " for c in text)
    return _SPECIAL.sub(r"\\\g<0>", " ".join(printable.split()))


def _facts(source: Source) -> Iterator[tuple[str, str]]:
    known = source.provenance
    if source.pairs is not None:
        yield "pairs", f"{len(source.scored):,} scored of {len(source.pairs):,}"
    for name, key in _FACTS:
        if (value := known.get(key)) is None:
            continue
        if key == "probed_parameters":
            yield name, f"{value:,} ({known.get('probed_kind', '?')})"
        else:
            yield name, _without_folders(str(value))


def _without_folders(value: str) -> str:
    """A path of this machine by its last part: a card is for others."""
    return Path(value).name if Path(value).is_absolute() else value


def _figures(source: Source) -> Iterator[Figure]:
    for section in sections([source]):
        blocks: Sequence[Block] = section.columns[0]
        shown = [block for block in blocks if isinstance(block, Figure)]
        if section.key in SHOWN:
            yield from shown[:1]


def _file(figure: Figure, number: int) -> str:
    """A figure's file, from the card; later runs' have a number."""
    return f"{FOLDER}/{figure.name}{f'-{number + 1}' if number else ''}.png"


def _table(table: Table) -> list[str]:
    head = [heading.text for heading in table.head]
    return [f"{escape(table.caption)}:", "", *_rows(head, table.rows)]


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, *rows]
    cells = ["| " + " | ".join(map(escape, line)) + " |" for line in lines]
    return [cells[0], "|" + "---|" * len(head), *cells[1:]]
