"""What a training run reads: pairs to train on, pairs held out, and their form for TRL.

Which pairs are held out, and which belong to a share, depends on the texts alone: neither on a seed nor on the
order of the data. So runs with other seeds, losses or shares are judged on the same pairs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from datasets import Dataset

from entangle.config.hashing import sha256_of
from entangle.data import PreferencePair
from entangle.data.pairs import Text
from entangle.errors import DataError

Sample = TypeVar("Sample")


def hold_out(
    pairs: Sequence[PreferencePair], share: float, limit: int | None
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(pairs to train on, held-out pairs); no prompt is on both sides.

    Args:
        pairs: all pairs.
        share: at most this share of the pairs is held out.
        limit: and at most this many.
    """
    count = math.floor(share * len(pairs))
    count = count if limit is None else min(count, limit)
    held: list[PreferencePair] = []
    for group in _by_prompt(pairs):
        if len(held) + len(group) <= count:
            held += group
    chosen = {pair.index for pair in held}
    return [p for p in pairs if p.index not in chosen], sorted(held, key=lambda pair: pair.index)


def take_share(samples: Sequence[Sample], share: float, key: Callable[[Sample], str]) -> list[Sample]:
    """The share of the samples whose keys come first by hash, in the data's order; at least one sample.

    Law: a smaller share is part of a larger one.

    Args:
        samples: all of them.
        share: in (0, 1].
        key: what a sample is told apart by.
    """
    count = max(1, math.ceil(share * len(samples)))
    first = sorted(range(len(samples)), key=lambda i: (_hash(key(samples[i])), i))[:count]
    return [samples[i] for i in sorted(first)]


def text_of(pair: PreferencePair) -> str:
    """All texts of a pair as one key for `take_share`."""
    return json.dumps([pair.prompt, pair.chosen, pair.rejected], sort_keys=True, default=str)


def preference_dataset(pairs: Sequence[PreferencePair]) -> Dataset:
    """Pairs under TRL's column names."""
    return Dataset.from_list(
        [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} | _template(p) for p in pairs]
    )


def chosen_rows(pairs: Sequence[PreferencePair]) -> list[dict[str, Any]]:
    """The chosen responses as completions, for supervised fine-tuning."""
    return [{"prompt": p.prompt, "completion": p.chosen} | _template(p) for p in pairs]


def completion_rows(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows of prompt and completion, checked.

    Args:
        rows: of a data set with these columns.
        names: our names of the two columns to the data's.

    Raises:
        DataError: a row lacks one of them.
    """
    prompt, completion = names.get("prompt", "prompt"), names.get("completion", "completion")
    found: list[dict[str, Any]] = []
    for index, row in enumerate(rows):
        texts: dict[str, Text] = {}
        for ours, theirs in (("prompt", prompt), ("completion", completion)):
            value = row.get(theirs)
            if not value or not isinstance(value, str | list):
                raise DataError(
                    f"Row {index}: expected a text or a list of messages in the column {theirs!r}; got {value!r}. "
                    f"Its columns are {', '.join(map(str, row))}; name yours with columns: {{{ours}: its_name}}."
                )
            texts[ours] = value
        found.append(texts)
    return found


def _by_prompt(pairs: Sequence[PreferencePair]) -> list[list[PreferencePair]]:
    groups: dict[str, list[PreferencePair]] = {}
    for pair in pairs:
        groups.setdefault(pair.prompt_hash, []).append(pair)
    return [groups[key] for key in sorted(groups)]  # a hash orders as well as chance does


def _template(pair: PreferencePair) -> dict[str, Any]:
    options = dict(pair.template_options)
    tools = {"tools": options.pop("tools")} if "tools" in options else {}
    return tools | ({"chat_template_kwargs": options} if options else {})


def _hash(text: str) -> str:
    return sha256_of([text.encode("utf-8", "surrogatepass")])
