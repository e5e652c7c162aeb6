"""Group sums of scores for the set's block, gathered while pairs are measured: in memory, or beside a run's shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from entangle.analysis.jackknife import assign_groups
from entangle.data import TokenizedPair
from entangle.measure.plan import is_scorable
from entangle.runs.folder import RunFolder
from entangle.runs.pace import Pace
from entangle.scores import Metric
from entangle.scores.summing import PassSums
from entangle.scores.sums import GroupSums, SumGram, memory

GROUPS = 16
"""Groups of pairs for the jackknife where memory allows it."""

FEWEST_GROUPS = 4
"""With fewer, Student's t makes intervals too wide to be of use."""

MOST_KINDS = 8
"""Kinds up to which the block of kinds is taken: each needs groups of its own."""

MEMORY = 5 * 2**30
"""Bytes that the sums may take: 4 groups of 150 million parameters, 16 of a LoRA of 40 million."""

NO_SET = (
    "The set of pairs as one isn't measured: that takes scored pairs of two different prompts at least, and memory for "
    f"sums of scores ({FEWEST_GROUPS} groups x 2 x 4 bytes per probed parameter, at most {MEMORY / 1e9:.1f} GB; a pass "
    "that ran out of memory gives them up). What is said here is of each pair alone."
)
"""What is said where the set's block is left out."""

FOLDER = "sums"
GIVEN_UP = "given_up"


@dataclass(frozen=True)
class Grouping:
    """Which pair belongs to which group of the jackknife.

    Args:
        groups: group by index of the pair.
        kinds: kind of each group, by the values of `column`; one kind without a column.
        column: of the data; None where kinds aren't told apart.
    """

    groups: Mapping[int, int]
    kinds: tuple[str, ...]
    column: str | None = None

    @classmethod
    def make(cls, pairs: Sequence[TokenizedPair], groups: int, column: str | None) -> Grouping:
        """All scorable pairs, a prompt's together; by kind where a column has a few kinds of them.

        Args:
            pairs: the pairs.
            groups: groups to make of them.
            column: of the pairs' own columns, to tell kinds apart by.
        """
        scored = [pair for pair in pairs if is_scorable(pair)]
        values = [str(pair.extra.get(column)) for pair in scored] if column else []
        known = 2 <= len(set(values)) <= min(MOST_KINDS, groups // 2)
        assigned, kinds = assign_groups(
            [pair.prompt_hash for pair in scored], groups, values if known else None
        )
        by_index = {pair.index: group for pair, group in zip(scored, assigned.tolist(), strict=True)}
        return cls(by_index, kinds, column if known else None)


class SetSums:
    """Group sums of scores in memory, filled pass by pass.

    Args:
        parameters: the probed parameters by name.
        grouping: of the pairs.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], grouping: Grouping) -> None:
        self.grouping = grouping
        self._sums = GroupSums(parameters, len(grouping.kinds))
        self._is_given_up = False

    def give_up(self) -> None:
        """A pass broke off and left a part of itself in the sums: from here on there are none."""
        self._is_given_up = True

    def of_pass(self, pairs: Sequence[TokenizedPair]) -> PassSums | None:
        """Where the pairs of a pass go (see `GroupSums.of_pass`); None once sums have been given up."""
        return None if self._is_given_up else _of_pass(self._sums, self.grouping, pairs)

    @classmethod
    def over(
        cls,
        parameters: Mapping[str, nn.Parameter],
        pairs: Sequence[TokenizedPair],
        column: str | None,
        limit: int = MEMORY,
    ) -> SetSums | None:
        """Sums over these pairs; None where there are no two prompts or memory allows no groups.

        Args:
            parameters: the probed parameters by name.
            pairs: all pairs.
            column: of the pairs' own columns, to tell kinds apart by.
            limit: bytes that the sums may take.
        """
        grouping = grouping_of(parameters, pairs, column, limit)
        return None if grouping is None else cls(parameters, grouping)

    def share(self, total: Callable[[Tensor], Tensor], gathered: Callable[[list], list]) -> None:
        """Join what all processes summed, each over its own pairs (see `GroupSums.share`); each must call."""
        self._is_given_up = any(gathered([self._is_given_up]))
        if not self._is_given_up:
            self._sums.share(total, gathered)

    def joined(self, metric: Metric | None = None) -> dict[str, SumGram] | None:
        """Products by module, in the metric of the passes; None if sums were given up."""
        return None if self._is_given_up else self._sums.module_grams(metric)

    def joined_under(self, metric: Metric) -> dict[str, SumGram] | None:
        """Products by module in another metric than the passes': of different groups alone, own terms being unknown."""
        found = self.joined(metric)
        return found and {
            module: replace(gram, own=torch.full_like(gram.own, torch.nan)) for module, gram in found.items()
        }


class RunSums:
    """Group sums of one process of a run, filled pass by pass and kept on disk shard by shard.

    A shard counts as summed once it is in the file, so a run that is killed sums again what wasn't kept.

    Args:
        run: the run folder.
        parameters: the probed parameters by name.
        grouping: of the run's pairs.
        process: number of this process.
        directions: sums kept of each group.
        table: folder of the shards' tables.
    """

    def __init__(
        self,
        run: RunFolder,
        parameters: Mapping[str, nn.Parameter],
        grouping: Grouping,
        process: int = 0,
        *,
        directions: int = 2,
        table: str = "pairs",
    ) -> None:
        self._run, self.grouping, self._parameters, self._table = run, grouping, parameters, table
        self._file = run.path / FOLDER / f"{process:03d}.safetensors"
        self._sums = (
            GroupSums.load(self._file, parameters)
            if self._file.is_file()
            else GroupSums(parameters, len(grouping.kinds), directions=directions)
        )
        self._pace = Pace()
        self._mark = run.path / FOLDER / GIVEN_UP
        self._is_paused = False

    @property
    def is_given_up(self) -> bool:
        """Whether a pass of this run broke off, so that the sums can't be trusted."""
        return self._mark.is_file()

    def give_up(self) -> None:
        """A pass broke off and left a part of itself in the sums: from here on the run does without them."""
        self._mark.parent.mkdir(exist_ok=True)
        self._mark.touch()

    def start(self, shard: int) -> None:
        """The passes of this shard come next; if it is summed already (its tables were lost), they add nothing."""
        self._is_paused = shard in self._sums.shards

    def of_pass(self, pairs: Sequence[TokenizedPair]) -> PassSums | None:
        """Where the pairs of a pass go (see `GroupSums.of_pass`); None once sums have been given up."""
        if self._is_paused or self.is_given_up:
            return None
        return _of_pass(self._sums, self.grouping, pairs)

    def add(self, index: int, prompt: str, parts: Mapping[str, Tensor]) -> None:
        """Add what one prompt has in every direction (see `GroupSums.add`).

        Args:
            index: of the prompt, as in the grouping.
            prompt: what tells prompts apart.
            parts: `(D, parameter's size)` by parameter.
        """
        if not (self._is_paused or self.is_given_up):
            self._sums.add(prompt, self.grouping.groups[index], parts)

    @property
    def kept(self) -> set[int]:
        """Shards that are in the files of any process; all finished ones where sums were given up."""
        if self.is_given_up:
            return set(self._run.shards_of(self._table))
        found: set[int] = set()
        for file in _files(self._run):
            with safe_open(file, "pt") as content:
                found.update(content.get_tensor("shards").tolist())
        return found

    def keep(self, shard: int, is_last: bool) -> None:
        """Note that a shard is summed; write the file, unless that took long and was done a moment ago."""
        self._sums.shards.add(shard)
        if self.is_given_up:
            return
        if not (is_last or self._pace.is_due):
            return
        self._file.parent.mkdir(exist_ok=True)
        with self._pace.saving():
            self._sums.save(self._file)

    @classmethod
    def over(
        cls,
        run: RunFolder,
        parameters: Mapping[str, nn.Parameter],
        pairs: Sequence[TokenizedPair],
        column: str | None,
        process: int = 0,
    ) -> RunSums | None:
        """Sums for a run over these pairs; None where there are no two prompts or memory allows no groups.

        Args:
            run: the run folder.
            parameters: the probed parameters by name.
            pairs: all of the run's.
            column: of the pairs' own columns, to tell kinds apart by.
            process: number of this process.
        """
        grouping = grouping_of(parameters, pairs, column)
        return None if grouping is None else cls(run, parameters, grouping, process)

    def joined(self, metric: Metric | None = None) -> dict[str, SumGram] | None:
        """Products by module of what all processes summed, for the main process when all are done; None if given up."""
        if self.is_given_up:
            return None
        for file in _files(self._run):
            if file != self._file:
                self._sums.merge(GroupSums.load(file, self._parameters))
        return self._sums.module_grams(metric)

    def remove(self) -> None:
        """Delete the files: what they were for is in set.json."""
        shutil.rmtree(self._run.path / FOLDER, ignore_errors=True)


def _of_pass(sums: GroupSums, grouping: Grouping, pairs: Sequence[TokenizedPair]) -> PassSums:
    groups = torch.tensor([grouping.groups[pair.index] for pair in pairs])
    return sums.of_pass(groups, [pair.prompt_hash for pair in pairs])


def grouping_of(
    parameters: Mapping[str, nn.Parameter],
    pairs: Sequence[TokenizedPair],
    column: str | None,
    limit: int = MEMORY,
) -> Grouping | None:
    """Groups of these pairs that memory allows; None where it allows none or there are no two prompts.

    Args:
        parameters: the probed parameters by name.
        pairs: all pairs.
        column: of the pairs' own columns, to tell kinds apart by.
        limit: bytes that the sums may take.
    """
    groups = affordable_groups(parameters, limit)
    prompts = {pair.prompt_hash for pair in pairs if is_scorable(pair)}
    return Grouping.make(pairs, groups, column) if groups and len(prompts) >= 2 else None


def affordable_groups(
    parameters: Mapping[str, nn.Parameter], limit: int = MEMORY, directions: int = 2
) -> int:
    """How many groups the memory allows, a power of two up to `GROUPS`; 0 where it isn't even `FEWEST_GROUPS`.

    Args:
        parameters: the probed parameters by name.
        limit: bytes.
        directions: sums kept of each group.
    """
    groups = GROUPS
    while groups >= FEWEST_GROUPS and memory(parameters, groups, directions) > limit:
        groups //= 2
    return groups if groups >= FEWEST_GROUPS else 0


def _files(run: RunFolder) -> list[Path]:
    return sorted((run.path / FOLDER).glob("[0-9]*.safetensors"))
