"""Tables of tokens for a terminal. Tokens are untrusted text: shown with control characters escaped, no markup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from entangle.analysis.wording import visible


def token_table(pair: Mapping[Any, Any], tokens: pd.DataFrame, loss: str, rows: int) -> RenderableType:
    """One pair: its numbers, then the tokens of each side that add most to c, in size, with what a step does to them.

    Args:
        pair: its row of the probe, with the prediction under `loss`.
        tokens: its rows of tokens.
        loss: the loss whose changes are shown.
        rows: tokens per side.
    """
    title = Text(f"Pair {pair['index']}", "bold")
    title.append(
        f"  cosine {pair['cosine']:.3f}, {str(pair['regime']).replace('_', ' ')} under {loss}: "
        f"chosen {pair['change_chosen']:+.3g}, rejected {pair['change_rejected']:+.3g} nats "
        "by a step of learning rate 1",
        "not bold",
    )
    table = Table(
        title=Text(f"Tokens that add most to the entanglement c; change under {loss}"), title_justify="left"
    )
    for column in ("", "at", "token", "shared", "log-prob", "% of c", "% of |g|^2", "change"):
        table.add_column(
            Text(column), justify="left" if column in ("", "token", "shared") else "right", no_wrap=True
        )
    for side, sign in (("chosen", "+"), ("rejected", "-")):
        part = tokens[tokens["side"] == side]
        own = part[f"along_{side}"].sum()
        order = part["share"].abs().sort_values(ascending=False, kind="stable").index[:rows]
        for token in part.loc[order].to_dict("records"):
            table.add_row(
                sign,
                str(token["position"]),
                Text(visible(token["text"])),
                token["shared"],
                f"{token['logp']:.2f}",
                f"{100 * token['share']:+.1f}",
                f"{100 * token[f'along_{side}'] / own:+.1f}",
                f"{token[f'change_{loss}']:+.3g}",
            )
        logp, change = part["logp"].sum(), part[f"change_{loss}"].sum()
        table.add_row(
            sign,
            "",
            f"all {len(part)} tokens",
            "",
            f"{logp:.2f}",
            "+100.0",
            "+100.0",
            f"{change:+.3g}",
            style="dim",
            end_section=side == "chosen",
        )
    return Group(title, table)
