"""The pairs of a run in the order in which they are computed, cut into shards and passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from entangle.data import TokenizedPair

TOKENS_PER_PASS = 4096
"""Padded tokens of a pass when no batch size is given."""


@dataclass(frozen=True)
class Plan:
    """The pairs of a run in the order in which they are computed, cut into shards and passes.

    It depends on the options and the data alone, so a resumed run computes exactly what an unbroken one would.

    Args:
        shards: the pairs, shard by shard, sorted by length.
        batch_size: pairs of a pass; None: as many as make `TOKENS_PER_PASS` padded tokens.
        most: more pairs than these, or than one, aren't in a pass whatever they are; None: no such bound.
    """

    shards: tuple[tuple[TokenizedPair, ...], ...]
    batch_size: int | None
    most: int | None = None

    @classmethod
    def make(
        cls,
        pairs: Sequence[TokenizedPair],
        shard_size: int,
        batch_size: int | None,
        most: int | None = None,
    ) -> Plan:
        """Sort by length, so that a pass holds little padding, and cut."""
        ordered = sorted(pairs, key=lambda pair: (longest(pair), len(pair.prompt_ids), pair.index))
        starts = range(0, len(ordered), shard_size)
        return cls(tuple(tuple(ordered[start : start + shard_size]) for start in starts), batch_size, most)

    @property
    def sizes(self) -> list[int]:
        """Pairs of each shard."""
        return [len(shard) for shard in self.shards]

    @property
    def first_pass(self) -> list[TokenizedPair] | None:
        """The first pass there is; None where no pair can be scored."""
        return next((batch for shard in range(len(self.shards)) for batch in self.passes(shard)), None)

    def passes(self, shard: int) -> Iterator[list[TokenizedPair]]:
        """The scorable pairs of a shard, as many at a time as go through the model together."""
        batch: list[TokenizedPair] = []
        for pair in filter(is_scorable, self.shards[shard]):
            limit = self.batch_size or max(1, TOKENS_PER_PASS // (2 * longest(pair)))
            limit = limit if self.most is None else min(limit, max(1, self.most))
            if len(batch) >= limit:  # pairs grow longer, so the newest one decides
                yield batch
                batch = []
            batch.append(pair)
        if batch:
            yield batch


def extremes(pairs: Iterable[TokenizedPair]) -> list[TokenizedPair]:
    """The shortest and the longest pair that can be scored, with which an engine checks the model; none without any."""
    scorable = sorted(filter(is_scorable, pairs), key=longest)
    return [scorable[0], scorable[-1]] if len(scorable) > 1 else scorable


def longest(pair: TokenizedPair) -> int:
    """Tokens of the longer of a pair's two rows."""
    return len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids))


def is_scorable(pair: TokenizedPair) -> bool:
    """Whether both responses have a token to score."""
    return not (pair.dropped or pair.empty)
