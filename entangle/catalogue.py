"""The catalogue of losses as rows and as text. Nothing is stated here: all of it is read from the classes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from losses import CATALOGUE, PreferenceLoss, build

FAMILIES = ("margin", "normalised", "anchored", "pointwise", "divergence", "batch", "tokens", "compose")
"""The families (modules of `losses`) in the order of the tables; others follow, a user's own module too."""


@dataclass(frozen=True)
class LossRow:
    """What the tables show of one loss, at its default hyper-parameters."""

    name: str
    title: str
    family: str
    formula: str
    ratio: str
    needs_reference: bool
    needs_lengths: bool
    is_batch_coupled: bool
    needs_tokens: bool
    paper: str
    is_confirmed: bool
    trl: str | None

    @property
    def reads(self) -> str:
        """What the loss reads beside the policy's summed log-probs, in words."""
        columns = {
            "reference": self.needs_reference,
            "lengths": self.needs_lengths,
            "tokens": self.needs_tokens,
            "the rest of the batch": self.is_batch_coupled,
        }
        return ", ".join(name for name, is_read in columns.items() if is_read) or "nothing else"

    @property
    def url(self) -> str | None:
        """Where the paper is, if it has an arXiv id."""
        is_arxiv = self.paper[:4].isdigit() and "." in self.paper
        return f"https://arxiv.org/abs/{self.paper}" if is_arxiv else None


def loss_row(spec: str | Mapping[str, Any] | PreferenceLoss) -> LossRow:
    """The row of one loss, given as `build` takes it."""
    loss = build(spec)
    title, _, formula = _first_line(loss.__doc__).removesuffix(".").partition(": ")
    return LossRow(
        name=loss.name,
        title=title,
        family=type(loss).__module__.rpartition(".")[2],
        formula=formula,
        ratio=loss.ratio,
        needs_reference=loss.needs_reference,
        needs_lengths=loss.needs_lengths,
        is_batch_coupled=loss.is_batch_coupled,
        needs_tokens=loss.needs_tokens,
        paper=loss.paper,
        is_confirmed=loss.is_confirmed,
        trl=loss.trl,
    )


def loss_rows(
    *,
    family: str | None = None,
    needs_reference: bool | None = None,
    batch_coupled: bool | None = None,
    needs_tokens: bool | None = None,
) -> list[LossRow]:
    """Rows of the catalogue, by family and then in the order of declaration; None doesn't filter.

    Raises:
        ValueError: no such family (the message lists them).

    Examples:
        >>> [row.name for row in loss_rows(family="divergence")]
        ['f_dpo_forward_kl', 'f_dpo_js', 'f_dpo_alpha', 'chipo']
    """
    rows = list(map(loss_row, CATALOGUE))
    families = list(dict.fromkeys([*FAMILIES, *(row.family for row in rows)]))
    if family is not None and family not in families:
        raise ValueError(f"Unknown family {family!r}. Families: {', '.join(families)}.")
    rows.sort(key=lambda row: families.index(row.family))
    wanted = {
        "family": family,
        "needs_reference": needs_reference,
        "is_batch_coupled": batch_coupled,
        "needs_tokens": needs_tokens,
    }
    filters = {name: value for name, value in wanted.items() if value is not None}
    return [row for row in rows if all(getattr(row, name) == value for name, value in filters.items())]


def ideal_condition(spec: str | Mapping[str, Any] | PreferenceLoss) -> str:
    """When a pair is ideal under this loss, in A = |g_w|^2, B = |g_l|^2, c = <g_w, g_l>.

    The loss's own words where it has any, else what follows from rho = d_w / d_l with both incentives
    positive: c/A < rho < B/c, or c <= 0.
    """
    loss = build(spec)
    if loss.ideal is not None:
        return loss.ideal
    if loss.needs_tokens:
        return "not decided by A, B, c: the incentives differ from token to token"
    return "c < min(A, B)" if loss.ratio == "1" else "c/A < rho < B/c, or c <= 0"


def explain(spec: str | Mapping[str, Any] | PreferenceLoss) -> str:
    """Everything about one loss, as text: formula, incentives, hyper-parameters with units, traps."""
    loss = build(spec)
    row = loss_row(loss)
    renamed = "".join(f"; its {theirs} is {ours} here" for theirs, ours in loss.trl_options.items())
    settings = {name: value for name, value in loss.config.items() if name != "name"}
    facts = {
        "name": row.name,
        "settings": ", ".join(f"{name}={value}" for name, value in settings.items()) or "none",
        "family": f"{row.family}: {_description(type(loss).__module__)}".removesuffix(": "),
        "rho = d_w/d_l": row.ratio,
        "ideal iff": ideal_condition(loss),
        "reads": row.reads,
        "in TRL": "no" if row.trl is None else row.trl + renamed,
        "trap": loss.trap,
        "unconfirmed": None if row.is_confirmed else "written from memory, not read in the paper or its code",
    }
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items() if value is not None]
    return "\n".join([inspect.cleandoc(loss.__doc__ or ""), "", *lines])


def markdown_table() -> str:
    """The catalogue as a Markdown table, for the README."""
    header = "| name | loss | formula | rho = d_w/d_l | reads | TRL | paper |"
    lines = [header, "|" + "---|" * (header.count("|") - 1)]
    for row in loss_rows():
        cells = (f"`{row.name}`", row.title, f"`{row.formula}`", f"`{row.ratio}`", row.reads, row.trl or "")
        escaped = [cell.replace("|", "\\|") for cell in cells]
        lines.append("| " + " | ".join([*escaped, _paper_link(row)]) + " |")
    return "\n".join(lines) + "\n\n\\* form from memory, not confirmed against the paper or its code.\n"


def _description(module: str) -> str:
    return _first_line(sys.modules[module].__doc__)


def _first_line(docstring: str | None) -> str:
    return inspect.cleandoc(docstring or "").partition("\n")[0]


def _paper_link(row: LossRow) -> str:
    mark = "" if row.is_confirmed else " \\*"
    return row.paper + mark if row.url is None else f"[{row.paper}]({row.url}){mark}"
