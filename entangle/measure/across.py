"""Products of every pair's scores with weighted sums of all pairs' scores, shard by shard in a run folder.

Two passes over the pairs for each block of directions that fits memory: every shard is added to the sums, and when
all processes have added theirs, every shard is multiplied with them. Where all scores fit memory, the second pass
finds them there.

    <run>/sums-000/000.safetensors       what each process has summed, until the products are there
    <run>/products-000/00000.parquet     a row per pair
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from entangle.analysis.geometry import SIDES
from entangle.data import TokenizedPair
from entangle.measure.plan import Plan
from entangle.models import Policy
from entangle.runs.atomic import replacing
from entangle.runs.pace import Pace
from entangle.runs.session import Advance, Session
from entangle.scores import Directions, Engine, HeldScores, Metric
from entangle.scores.directions import directions_at_a_time

SHARDS = "shards"
"""Beside the sums of a file: which shards they are over. A parameter's name has a prefix."""


@dataclass(frozen=True)
class Weights:
    """What the directions are: T_d = sum over pairs i of (chosen[d, i] S_wi + rejected[d, i] S_li).

    Args:
        values: `(D, 2, N)` float64: of both scores of every pair.
        indices: `(N,)`, index of each pair.
    """

    values: Tensor
    indices: Sequence[int]

    def __len__(self) -> int:
        """D."""
        return len(self.values)

    def of(self, pairs: Sequence[TokenizedPair], directions: slice) -> Tensor:
        """`(directions, 2n)`, of the rows of a pass: chosen rows, then rejected ones."""
        places = pd.Index(self.indices).get_indexer(pd.Index([pair.index for pair in pairs]))
        return self.values[directions][:, :, torch.from_numpy(places)].flatten(1)


class KeptDirections:
    """Directions of one process, filled pass by pass and kept on disk shard by shard.

    A shard counts as summed once it is in the file, so a run that is killed sums again what wasn't kept.

    Args:
        folder: where the files of all processes are.
        parameters: the probed parameters by name.
        process: number of this process.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, nn.Parameter], process: int = 0) -> None:
        self._folder, self._parameters = folder, parameters
        self._file = folder / f"{process:03d}.safetensors"
        self._shards: set[int] = set()
        self.directions = Directions()
        if self._file.is_file():
            self._shards, self.directions = _read_shards(self._file), self._load(self._file)
        self._pace = Pace()

    @property
    def kept(self) -> set[int]:
        """Shards that are in the files of any process."""
        return set[int]().union(*map(_read_shards, self._files))

    def keep(self, shard: int, is_last: bool) -> None:
        """Note that a shard is summed; write the file, unless that took long and was done a moment ago."""
        self._shards.add(shard)
        if not (is_last or self._pace.is_due):
            return
        self._folder.mkdir(exist_ok=True)
        tensors = {f"sum/{name}": value.cpu() for name, value in self.directions.sums.items()}
        with self._pace.saving(), replacing(self._file) as temporary:
            save_file(tensors | {SHARDS: torch.tensor(sorted(self._shards))}, temporary)

    def joined(self) -> Directions:
        """What all processes have summed, when all are done."""
        total = Directions()
        for file in self._files:
            total.merge(self._load(file))
        return total

    def remove(self) -> None:
        """Delete the files of all processes."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.safetensors"))

    def _load(self, file: Path) -> Directions:
        read = {name.removeprefix("sum/"): value for name, value in load_file(file).items() if name != SHARDS}
        return Directions({name: value.to(self._parameters[name].device) for name, value in read.items()})


@dataclass(frozen=True)
class CrossProducts:
    """<S_a, P T_d> for both scores a of every pair and all directions d.

    Args:
        session: of the run whose folder takes what is finished; its processes share the shards.
        plan: the pairs.
        policy: the model.
        engine: its scores.
        weights: of the directions.
        metric: the diagonal metric P, None for P = 1.
    """

    session: Session
    plan: Plan
    policy: Policy
    engine: Engine
    weights: Weights
    metric: Metric | None = None

    def measure(self) -> None:
        """Take the products of all shards that aren't there yet.

        Raises:
            Interrupted: Ctrl-C; the shard at hand is finished.
        """
        held = HeldScores(self.engine)
        for block, directions in enumerate(self._blocks):
            if len(self.session.run.shards_of(_products(block))) < len(self.plan.sizes):
                self._measure_block(block, directions, held)

    def read(self) -> Tensor:
        """The products, `(N, 2, D)` float64, when all processes are done; pairs as in `weights`."""
        tables = [self.session.run.read_shards(_products(block)) for block in range(len(self._blocks))]
        columns = [f"{side}_{number}" for side in SIDES for number in range(len(self.weights))]
        table = pd.concat([rows.set_index("index") for rows in tables], axis=1)
        values = torch.tensor(table.loc[list(self.weights.indices), columns].to_numpy())
        return values.view(-1, 2, len(self.weights))

    @property
    def _blocks(self) -> list[slice]:
        """Directions that are held at the same time."""
        size = directions_at_a_time(self.engine)
        return [slice(first, first + size) for first in range(0, len(self.weights), size)]

    def _measure_block(self, block: int, directions: slice, held: HeldScores) -> None:
        session, sizes = self.session, self.plan.sizes
        sums = KeptDirections(
            session.run.path / f"sums-{block:03d}",
            self.engine.parameters,
            session.processes.process_index,
        )

        def add(shard: int, advance: Advance) -> None:
            for pairs, scores in self._passes(shard, held, advance):
                sums.directions.add(scores, self.weights.of(pairs, directions))

        session.sum_up("pairs summed", sizes, add, sums)
        total = sums.joined().under(self.metric)

        def tables_of(shard: int, advance: Advance) -> dict[str, pd.DataFrame]:
            rows = [
                _rows(pairs, total.products(scores), directions.start)
                for pairs, scores in self._passes(shard, held, advance)
            ]
            return {_products(block): pd.concat(rows, ignore_index=True)}

        session.compute(_products(block), sizes, tables_of, unit="pairs measured")
        if session.is_main:
            sums.remove()

    def _passes(
        self, shard: int, held: HeldScores, advance: Advance
    ) -> Iterator[tuple[list[TokenizedPair], Mapping[str, Tensor]]]:
        """The passes of a shard with the scores of their rows."""
        for number, pairs in enumerate(self.plan.passes(shard)):
            yield pairs, held.of((shard, number), self.policy.collate(pairs))
            advance(len(pairs))


def _products(block: int) -> str:
    return f"products-{block:03d}"


def _rows(pairs: Sequence[TokenizedPair], products: Tensor, first: int) -> pd.DataFrame:
    """A row per pair, from `(2n, directions)`; columns <side>_<number of the direction>."""
    values = {
        f"{side}_{first + number}": part[:, number].numpy()
        for side, part in zip(SIDES, products.chunk(2), strict=True)
        for number in range(products.shape[1])
    }
    return pd.DataFrame({"index": [pair.index for pair in pairs]} | values)


def _read_shards(file: Path) -> set[int]:
    with safe_open(file, "pt") as content:
        return set(content.get_tensor(SHARDS).tolist())
