"""Options of `entangle filter`, and the rules that it is given.

    rule       condition [and condition ...]
    condition  FLAG                        truncated
               COLUMN OP VALUE             cosine>0.9    regime==both_down
               COLUMN highest|lowest N%    ches highest 10%

A rule is data: it is parsed here, and nothing of it is ever executed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import tyro

from entangle.config.base import Options
from entangle.config.kinds import Loss, RunName
from entangle.errors import ConfigError

_COMPARISON = re.compile(r"([A-Za-z_]\w*)\s*(<=|>=|==|=|!=|<|>)\s*(\S+)")
_SHARE = re.compile(r"([A-Za-z_]\w*)\s+(highest|lowest)\s+(\d+(?:\.\d+)?)\s*%")
_FLAG = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True)
class Condition:
    """One part of a rule.

    Args:
        column: what is looked at.
        operator: a comparison, `highest` or `lowest` (with a percentage), or `is` for a flag.
        value: a number, a word, or True for a flag.
    """

    column: str
    operator: str
    value: float | str | bool


@dataclass(frozen=True)
class Rule:
    """Pairs for which every condition holds; a condition on a number that a pair doesn't have doesn't hold."""

    text: str
    conditions: tuple[Condition, ...]


def parse_rule(text: str) -> Rule:
    """A rule from its text.

    Raises:
        ConfigError: it isn't of the grammar above.

    Example:
        >>> parse_rule("cosine>0.9 and truncated").conditions[0]
        Condition(column='cosine', operator='>', value=0.9)
    """
    parts = [part.strip() for part in re.split(r"\s+and\s+", text.strip())]
    return Rule(" and ".join(parts), tuple(_condition(part, text) for part in parts))


def _condition(part: str, text: str) -> Condition:
    if found := _SHARE.fullmatch(part):
        column, operator, value = found.groups()
        if not 0 < float(value) <= 100:
            raise ConfigError(f"Expected a percentage above 0 and up to 100 in {text!r}; got {value}%.")
        return Condition(column, operator, float(value))
    if found := _COMPARISON.fullmatch(part):
        column, operator, value = found.groups()
        operator = "==" if operator == "=" else operator
        try:
            return Condition(column, operator, float(value))
        except ValueError:
            if operator in ("==", "!="):
                return Condition(column, operator, value)
            raise ConfigError(f"Expected a number after {operator} in {text!r}; got {value!r}.") from None
    if _FLAG.fullmatch(part):
        return Condition(part, "is", True)
    raise ConfigError(
        f"Can't read {part!r} in the rule {text!r}. Expected a flag (truncated), COLUMN OP VALUE (cosine>0.9, "
        "regime==both_down) or COLUMN highest|lowest N% (ches highest 10%), joined by `and`."
    )


def parse_weight(text: str) -> tuple[float, Rule]:
    """A weight and the rule that gives it: `0.5: cosine>0.9`.

    Raises:
        ConfigError: it isn't of this form, or the weight is negative.
    """
    number, colon, rule = text.partition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if not colon or not 0 <= weight < float("inf"):
        raise ConfigError(
            f"A weight is given as NUMBER: RULE (for instance '0.5: cosine>0.9'); got {text!r}."
        )
    return weight, parse_rule(rule)


@dataclass(frozen=True)
class FilterConfig(Options):
    """The data set of a finished probe without its harmful pairs, or with weights.

    A rule is one or more conditions joined by `and`: a flag (truncated, identical, dropped, empty, non_finite,
    duplicate_prompt, duplicate_pair), COLUMN OP VALUE (cosine>0.9, slack<0, regime==both_down) or COLUMN highest|lowest
    N% (ches highest 10%). Columns: those of the run's pairs with their diagnostics, of its predictions under --loss,
    and text_distance (edit distance of the texts by character over the longer one: near-duplicates are near 0).
    """

    run: tyro.conf.Positional[RunName] = ""
    """Run folder of a finished probe."""
    out: str = ""
    """File to write, in the format of the data set; a data set from the hub or a folder goes to .jsonl or .parquet."""
    drop: tuple[str, ...] = ()
    """Rules; a pair that matches any of them is dropped."""
    weight: tuple[str, ...] = ()
    """NUMBER: RULE; a pair that matches gets this weight (the product, if several match), any other pair 1."""
    loss: Loss | None = None
    """Loss of the run whose regime, changes and slack are meant; by default its first."""
    weight_column: str = "weight"
    """Name of the column of weights."""
    unprobed: Literal["keep", "drop"] = "keep"
    """What happens to rows of the data set that the run left out (--limit)."""
    formulas: Literal["say", "quote"] = "say"
    """Texts in a .csv file that a spreadsheet would run (they begin with = + - @): `say` counts them and leaves them as
    they are, since the file is for training; `quote` puts an apostrophe before each."""
    dry_run: bool = False
    """Say what would go and why, and write nothing."""
    overwrite: bool = False
    """Replace a file that is already at --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for rule in self.drop:
            parse_rule(rule)
        for weight in self.weight:
            parse_weight(weight)
