"""A graph convolutional network of depth 3 (arXiv 1609.02907) that names the classes of vertices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from experiments.interactions.graphs import Adjacency

WIDTH, EPOCHS, RATE, DECAY, DROPOUT = 64, 200, 0.01, 5e-4, 0.5


class GCN(nn.Module):
    """h^(l) = P relu(h^(l-1)) W^(l) + b^(l), P = D^-1/2 A D^-1/2; h^(0) are the features, without relu."""

    def __init__(self, adjacency: Adjacency, inputs: int, classes: int):
        super().__init__()
        self.first, self.second = nn.Linear(inputs, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.third = nn.Linear(WIDTH, classes)
        dense = torch.tensor(adjacency, dtype=torch.float32)
        scale = dense.sum(1).rsqrt()
        self.propagation = (scale[:, None] * dense * scale).to_sparse_coo().coalesce()

    def forward(self, features: Tensor) -> Tensor:
        """Logits `(V, classes)` from features `(V, F)`."""
        hidden = features
        for layer in (self.first, self.second, self.third):
            if layer is not self.first:
                hidden = nn.functional.dropout(hidden.relu(), DROPOUT, self.training)
            hidden = torch.sparse.mm(self.propagation, hidden @ layer.weight.T) + layer.bias
        return hidden


def accuracy(adjacency: Adjacency, features: Tensor, labels: Tensor, labelled: Tensor, seed: int) -> float:
    """Share of the unlabelled vertices named rightly by a network trained on the labelled; nothing is selected.

    Shapes: features `(V, F)`; labels, and which of them are seen, `(V,)`. The seed is of weights and dropout.
    """
    torch.manual_seed(seed)
    model = GCN(adjacency, features.shape[1], int(labels.max()) + 1)
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE, weight_decay=DECAY)
    for _ in range(EPOCHS):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(features)[labelled], labels[labelled]).backward()
        optimiser.step()
    with torch.no_grad():
        right = model.eval()(features).argmax(1) == labels
    return float(right[~labelled].float().mean())
