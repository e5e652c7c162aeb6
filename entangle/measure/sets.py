"""The set's block, gathered while the pairs are measured: group sums of scores, kept beside the run's shards."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import safe_open
from torch import nn

from entangle.analysis.jackknife import Estimate, assign_groups
from entangle.analysis.sets import GramSums, SetGeometry, SetMove, by_kind
from entangle.data import TokenizedPair
from entangle.measure.modules import describe_modules
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

MEMORY = 2**31
"""Bytes that the sums may take."""

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
    """Group sums of one process, filled pass by pass and kept on disk shard by shard.

    A shard counts as summed once it is in the file, so a run that is killed sums again what wasn't kept.

    Args:
        run: the run folder.
        parameters: the probed parameters by name.
        grouping: of the run's pairs.
        process: number of this process.
    """

    def __init__(
        self, run: RunFolder, parameters: Mapping[str, nn.Parameter], grouping: Grouping, process: int = 0
    ) -> None:
        self._run, self.grouping, self._parameters = run, grouping, parameters
        self._file = run.path / FOLDER / f"{process:03d}.safetensors"
        self._sums = (
            GroupSums.load(self._file, parameters)
            if self._file.is_file()
            else GroupSums(parameters, len(grouping.kinds))
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
        groups = torch.tensor([self.grouping.groups[pair.index] for pair in pairs])
        return self._sums.of_pass(groups, [pair.prompt_hash for pair in pairs])

    @property
    def kept(self) -> set[int]:
        """Shards that are in the files of any process; all finished ones where sums were given up."""
        if self.is_given_up:
            return set(self._run.shards_of("pairs"))
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
    def of_run(
        cls,
        run: RunFolder,
        parameters: Mapping[str, nn.Parameter],
        pairs: Sequence[TokenizedPair],
        column: str | None,
        process: int = 0,
    ) -> SetSums | None:
        """Sums for a run over these pairs; None where there are no two prompts or memory allows no groups.

        Args:
            run: the run folder.
            parameters: the probed parameters by name.
            pairs: all of the run's.
            column: of the pairs' own columns, to tell kinds apart by.
            process: number of this process.
        """
        groups = affordable_groups(parameters)
        prompts = {pair.prompt_hash for pair in pairs if is_scorable(pair)}
        if not groups or len(prompts) < 2:
            return None
        return cls(run, parameters, Grouping.make(pairs, groups, column), process)

    def joined(self, metric: Metric | None = None) -> dict[str, SumGram] | None:
        """Products by module of what all processes summed, for the main process when all are done; None if given up."""
        if self.is_given_up:
            return None
        total = GroupSums(self._parameters, len(self.grouping.kinds))
        for file in _files(self._run):
            total.merge(GroupSums.load(file, self._parameters))
        return total.module_grams(metric)

    def remove(self) -> None:
        """Delete the files: what they were for is in set.json."""
        shutil.rmtree(self._run.path / FOLDER, ignore_errors=True)


def affordable_groups(parameters: Mapping[str, nn.Parameter], limit: int = MEMORY) -> int:
    """How many groups the memory allows, a power of two up to `GROUPS`; 0 where it isn't even `FEWEST_GROUPS`."""
    groups = GROUPS
    while groups >= FEWEST_GROUPS and memory(parameters, groups) > limit:
        groups //= 2
    return groups if groups >= FEWEST_GROUPS else 0


def _files(run: RunFolder) -> list[Path]:
    return sorted((run.path / FOLDER).glob("[0-9]*.safetensors"))


SET_DETAILS = ("sums", "layers", "kinds")
"""Parts of set.json that the summary leaves out."""

# --- what set.json holds ------------------------------------------------------------------------------------


def set_content(
    grams: Mapping[str, SumGram], grouping: Grouping, predictions: pd.DataFrame, metric: str
) -> dict[str, Any]:
    """The set's block, what each loss does to it, the block of kinds, and the block by layer, for set.json.

    Args:
        grams: products of group sums by module.
        grouping: of the pairs.
        predictions: rows of the run's predictions: incentives per pair and loss.
        metric: name of the optimiser's metric.
    """
    total = _added(grams.values())
    geometry = SetGeometry.from_sums(total, grouping.kinds)
    content = {
        "metric": metric,
        "pairs": geometry.pairs,
        "prompts": geometry.prompts,
        "groups": len(grouping.kinds),
        **block_of(geometry),
        "losses": moves_of(geometry, predictions),
        "epoch": block_of(geometry.epoch()) | {"losses": moves_of(geometry.epoch(), predictions)},
        "layers": {
            name: block_of(SetGeometry.from_sums(gram, grouping.kinds)) for name, gram in _by_layer(grams)
        },
        "sums": {
            "kinds": grouping.kinds,
            **{
                name: getattr(total, name).tolist()
                for name in ("products", "own", "pairs", "squares", "prompts")
            },
        },
    }
    if grouping.column:
        content["kinds"] = {
            "column": grouping.column,
            "block": [
                {"of": of, "by": by} | block_of(found) | {"losses": moves_of(found, predictions)}
                for (of, by), found in by_kind(total, grouping.kinds).items()
            ],
        }
    return content


def geometry_of_content(content: Mapping[str, Any]) -> SetGeometry:
    """The set's geometry from set.json: other losses are judged without the model."""
    sums = content["sums"]
    numbers = {
        name: torch.tensor(sums[name], dtype=torch.float64 if name in ("products", "own") else torch.int64)
        for name in ("products", "own", "pairs", "squares", "prompts")
    }
    return SetGeometry.from_sums(GramSums(**numbers), tuple(sums["kinds"]))


def block_of(geometry: SetGeometry) -> dict[str, Any]:
    """U_ww, U_wl, U_ll, cosine, norm ratio and band with intervals, and the own terms."""
    lower, upper = geometry.band
    own = geometry.own
    return {
        "sq_chosen": asdict(geometry.sq_chosen),
        "inner": asdict(geometry.inner),
        "sq_rejected": asdict(geometry.sq_rejected),
        "own": {"sq_chosen": float(own[0, 0]), "inner": float(own[0, 1]), "sq_rejected": float(own[1, 1])},
        "cosine": asdict(geometry.cosine),
        "may_be_parallel": geometry.may_be_parallel,
        "norm_ratio": asdict(geometry.norm_ratio),
        "band": [asdict(lower), asdict(upper)],
    }


def moves_of(geometry: SetGeometry, predictions: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """By loss: what its mean incentives do to the mean log-probs, and the drift."""
    found = {}
    for loss, rows in predictions.groupby("loss", sort=False):
        chosen, rejected = rows["incentive_chosen"], rows["incentive_rejected"]
        move = geometry.move(float(chosen.mean()), float(rejected.mean()))
        spread = max(float(chosen.std(ddof=0)), float(rejected.std(ddof=0)))
        is_exact = spread <= 1e-6 * max(abs(float(chosen.mean())), abs(float(rejected.mean())))
        found[str(loss)] = move_content(move) | {
            "incentive_chosen": float(chosen.mean()),
            "incentive_rejected": float(rejected.mean()),
            "is_exact": is_exact,
        }
    return found


def move_content(move: SetMove) -> dict[str, Any]:
    """A move as plain values."""
    numbers = {name: asdict(getattr(move, name)) for name in ("chosen", "rejected", "margin", "drift")}
    return numbers | {"regime": str(move.regime), "is_certain": move.is_certain}


def estimate_of(content: Mapping[str, Any]) -> Estimate:
    """An estimate from its plain values, in which null stands for what isn't finite."""
    low, high = content["low"], content["high"]
    return Estimate(
        value=float("nan") if content["value"] is None else content["value"],
        low=float("-inf") if low is None else low,
        high=float("inf") if high is None else high,
        has_meaning=content["has_meaning"],
        pairs_needed=content["pairs_needed"],
    )


def _added(grams: Any) -> SumGram:
    first, *rest = grams
    products, own = first.products.clone(), first.own.clone()
    for gram in rest:
        products += gram.products
        own += gram.own
    return replace(first, products=products, own=own)


def _by_layer(grams: Mapping[str, SumGram]) -> list[tuple[str, SumGram]]:
    """Products by layer; what is outside the layers under its kind."""
    names = describe_modules(list(grams))
    parts: dict[str, list[SumGram]] = defaultdict(list)
    for name, layer, kind in zip(names["module"], names["layer"], names["kind"], strict=True):
        parts[str(kind) if pd.isna(layer) else str(layer)].append(grams[name])
    return [(name, _added(found)) for name, found in parts.items()]
