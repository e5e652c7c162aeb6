"""Measure and draw both halves of the study; what a table holds already isn't measured again.

python -m experiments.interactions.run experiments/results/interactions
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student

from experiments.interactions.classifier import accuracy
from experiments.interactions.figures import draw_accuracy, draw_ranks
from experiments.interactions.graphs import edges_of, graph, nearest_neighbours, small_graphs
from experiments.interactions.network import generic
from experiments.interactions.pruning import by_near_walks, by_resistance, resistances
from experiments.interactions.separation import cut, grid_ranks
from experiments.interactions.walks import walk_index

PARTITIONS = {"halves": (1, 1, 1, 0, 0, 0), "alternating": (1, 0, 1, 0, 1, 0), "one": (1, 0, 0, 0, 0, 0)}
DEPTHS, WIDTHS, TARGETS = (1, 2, 3), (2, 3, 4), {"graph": None, "vertex": 0}
SHARES, SEEDS, NEIGHBOURS, LABELLED = (0.5, 0.7, 0.8, 0.9, 0.95), range(5), 10, 0.2
SETTING = ("graph", "partition", "depth", "width", "prediction", "walk_index", "cut", "ranks")
RUN = ("features", "method", "removed", "seed", "isolated", "accuracy")
Row = Mapping[str, str | int | float]


def separations() -> Iterator[Row]:
    """Walk index, upper bound (log_D) and ranks of growing grids of every setting."""
    settings = product(small_graphs(6).items(), PARTITIONS.items(), DEPTHS, WIDTHS, TARGETS.items())
    for number, ((name, adjacency), (partition, places), depth, width, (kind, target)) in enumerate(settings):
        rng, inside = np.random.default_rng(number), np.array(places, bool)
        ranks = " ".join(map(str, grid_ranks(generic(adjacency, depth, width, rng), inside, rng, target)))
        index, bound = walk_index(adjacency, inside, depth - 1, target), cut(adjacency, inside, depth, target)
        yield dict(zip(SETTING, (name, partition, depth, width, kind, index, bound, ranks), strict=True))


def accuracies() -> Iterator[Row]:
    """Accuracy on scikit-learn's digits, with their pixels as features and with none but the vertex's identity."""
    from sklearn.datasets import load_digits

    pixels, digits = (np.asarray(values) for values in load_digits(return_X_y=True))
    adjacency, vertices = nearest_neighbours(pixels / 16, NEIGHBOURS), len(digits)
    features = {"pixels": torch.tensor(pixels / 16, dtype=torch.float32), "identity": torch.eye(vertices)}
    for seed in SEEDS:
        labelled = torch.tensor(np.random.default_rng(seed).permutation(vertices) < LABELLED * vertices)
        rng, edges = np.random.default_rng(seed), edges_of(adjacency)
        edges = [edges[k] for k in rng.permutation(len(edges))]  # equals go in random order
        orders = {"random": edges, "spectral": by_resistance(edges, resistances(adjacency, edges), rng)}
        orders |= {f"walks_{length}": by_near_walks(adjacency, edges, length) for length in (1, 2)}
        settings = [("none", 0.0, []), ("none", 1.0, edges)]
        for name, order in orders.items():
            settings += [(name, share, order[: round(share * len(edges))]) for share in SHARES]
        for (method, share, removed), (kind, values) in product(settings, features.items()):
            pruned = graph(vertices, set(edges) - set(removed))
            found = accuracy(pruned, values, torch.tensor(digits), labelled, seed)
            row = (kind, method, share, seed, int((pruned.sum(1) == 1).sum()), round(found, 5))
            yield dict(zip(RUN, row, strict=True))


def summarise(rows: Sequence[Row]) -> Iterator[Row]:
    """Accuracy in percent, and its gain over `random` on the same seeds, with half widths of 95 % t intervals."""
    cells: dict[tuple, list[float]] = {}
    for row in rows:  # in the order of seeds
        cells.setdefault(tuple(row[name] for name in RUN[:3]), []).append(100 * float(row["accuracy"]))
    for (kind, method, removed), values in sorted(cells.items()):
        gains = np.subtract(values, cells.get((kind, "random", removed), values))
        row = {"features": kind, "method": method, "removed": removed}
        for name, numbers in (("accuracy", values), ("over_random", gains)):
            half = student.ppf(0.975, len(numbers) - 1) * np.std(numbers, ddof=1) / len(numbers) ** 0.5
            row |= {name: f"{np.mean(numbers):.2f}", f"{name}_interval": f"{half:.2f}"}
        yield row


def table(path: Path, rows: Iterable[Row]) -> list[Row]:
    """The rows of a CSV file, as text; measured and written first if there is no such file."""
    if not path.exists():
        measured = list(rows)
        lines = [list(measured[0]), *(row.values() for row in measured)]
        path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    return list(csv.DictReader(path.read_text().splitlines()))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    draw_ranks(table(folder / "ranks.csv", separations()), folder / "ranks.png")
    summary = summarise(table(folder / "accuracy.csv", accuracies()))
    (folder / "summary.csv").unlink(missing_ok=True)
    draw_accuracy(table(folder / "summary.csv", summary), folder / "accuracy.svg")
