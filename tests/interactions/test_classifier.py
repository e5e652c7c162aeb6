"""The GCN computes its formula, and learns where the graph tells."""

from __future__ import annotations

import numpy as np
import torch

from experiments.interactions import classifier
from experiments.interactions.classifier import GCN, accuracy
from experiments.interactions.graphs import edges_of, graph


def communities(rng: np.random.Generator) -> tuple[np.ndarray, torch.Tensor]:
    """Three groups of 20, joined much within and little between."""
    labels = np.repeat(range(3), 20)
    share = np.where(labels[:, None] == labels, 0.4, 0.02)
    joined = np.argwhere(np.triu(rng.random((60, 60)) < share, 1)).tolist()
    return graph(60, [(i, j) for i, j in joined]), torch.tensor(labels)


def test_layers_equal_the_dense_formula():
    rng = np.random.default_rng(0)
    adjacency, _ = communities(rng)
    torch.manual_seed(0)
    model = GCN(adjacency, 5, 3).eval()
    features = torch.randn(60, 5)
    spread = adjacency / np.sqrt(np.outer(adjacency.sum(1), adjacency.sum(0)))
    hidden = features.double().numpy()
    for number, layer in enumerate((model.first, model.second, model.third)):
        weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
        hidden = spread @ (np.maximum(hidden, 0) if number else hidden) @ weight.T + bias
    np.testing.assert_allclose(model(features).detach().numpy(), hidden, atol=1e-5)


def test_without_features_the_graph_is_all_there_is():
    """With edges the groups are found; without them an unlabelled vertex is one that nothing was learned of."""
    rng = np.random.default_rng(1)
    adjacency, labels = communities(rng)
    labelled = torch.tensor(rng.permutation(60) < 12)
    assert edges_of(adjacency)
    assert accuracy(adjacency, torch.eye(60), labels, labelled, 0) > 0.8
    assert accuracy(graph(60, ()), torch.eye(60), labels, labelled, 0) < 0.6


def test_a_seed_fixes_a_run(monkeypatch):
    monkeypatch.setattr(classifier, "EPOCHS", 10)
    adjacency, labels = communities(np.random.default_rng(2))
    labelled = torch.arange(60) % 5 == 0
    first, again = (accuracy(adjacency, torch.eye(60), labels, labelled, 3) for _ in range(2))
    assert first == again
