"""Pairs for a terminal: the worst ones as readable blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from entangle.analysis.geometry import SIDES
from entangle.analysis.verdict import worst_pairs
from entangle.analysis.wording import is_known, pair_sentence
from entangle.tables.base import snippet


def pair_cards(
    pairs: pd.DataFrame, predictions: pd.DataFrame, texts: pd.DataFrame | None, loss: str, count: int
):
    """The worst pairs as readable blocks: numbers, a sentence, and a snippet of both responses."""
    worst = worst_pairs(pairs, predictions, loss, count)
    if worst.empty:
        return Text(f"No pair's chosen log-prob falls under {loss}.", style="green")
    by_index: dict[Any, Any] = {} if texts is None else texts.set_index("index").to_dict("index")
    cards: list[RenderableType] = [
        Text(f"Worst pairs under {loss}: its next step lowers their chosen response most", "bold")
    ]
    cards += [
        _card({str(k): v for k, v in row.items()}, by_index.get(row["index"]))
        for row in worst.to_dict("records")
    ]
    return Group(*cards)


def _history(row: Mapping[str, Any]) -> str:
    """What has happened to a pair since its reference, said before what a step would do next; empty without one."""
    chosen, rejected = (row[f"logps_{side}"] - row[f"ref_logps_{side}"] for side in SIDES)
    if not (is_known(chosen) and is_known(rejected)):
        return ""
    if chosen == rejected == 0:
        return "So far: nothing has moved since the reference. Next: "
    return f"So far, since the reference: chosen {chosen:+.3g} nats, rejected {rejected:+.3g}. Next: "


def _card(row: Mapping[str, Any], text: Mapping[str, str] | None) -> Panel:
    body = Text(_history(row))
    body.append(pair_sentence(row, row))
    body.append(
        f"\ncosine {row['cosine']:.3f}; a step of learning rate 1 changes the chosen by {row['change_chosen']:+.3g}, "
        f"the rejected by {row['change_rejected']:+.3g} nats; {row['length_chosen']:.0f} and "
        f"{row['length_rejected']:.0f} tokens",
        style="dim",
    )
    if text is not None:
        body.append("\n+ ", style="green").append(snippet(text["chosen"]))
        body.append("\n- ", style="red").append(snippet(text["rejected"]))
    return Panel(body, title=Text(f"pair {row['index']}"), title_align="left", border_style="dim")
