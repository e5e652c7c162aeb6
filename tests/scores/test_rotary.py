"""Rotary factors that depend on the longest row: every row has those of its own length, whatever stands beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from entangle.scores import AutogradEngine, FactoredEngine, row_logps
from entangle.scores.logps import Rows, rows_for
from entangle.scores.prefix import split_for
from entangle.scores.rotary import LengthFactors, alike, length_factors
from entangle.scores.rows import RowBatch
from entangle.scores.tokens import token_products
from tests.architectures import random_batch, select, tiny_model, trainable, with_lora
from tests.scores.test_architectures import relative_error

pytestmark = pytest.mark.usefixtures("keeping_float64")

ORIGINAL = 9
"""Tokens up to which rows have the short factors; rows of `random_batch` have 4 to 14."""

SCALING = {
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [1.5, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": ORIGINAL,
        "factor": 4.0,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
}
MODELS = {"longrope": "phi3", "dynamic": "llama"}


def scaled_model(kind: str) -> nn.Module:
    """A tiny model with LoRA whose factors depend on length in this way."""
    reach = 64 if kind == "longrope" else ORIGINAL
    options: dict[str, Any] = {"original_max_position_embeddings": ORIGINAL} if kind == "longrope" else {}
    model = tiny_model(MODELS[kind], rope_parameters=SCALING[kind], max_position_embeddings=reach, **options)
    return with_lora(model)


def alone(model: nn.Module, batch: RowBatch) -> tuple[Tensor, Tensor]:
    """Gram matrix and log-probs of whole rows, each in a forward pass of its own on a fresh model's factors."""
    parameters = list(trainable(model).values())
    scores, logps = [], []
    for ids, mask, scored in zip(
        batch.input_ids, batch.attention_mask.bool(), batch.completion_mask.bool(), strict=True
    ):
        model(input_ids=ids[mask][None, :1], use_cache=False)  # short: forgets the factors of longer rows
        logits = model(input_ids=ids[mask][None], use_cache=False).logits[0]
        where = scored[mask].nonzero()[:, 0]
        logp = logits.log_softmax(-1)[where - 1, ids[mask][where]].sum()
        scores.append(torch.cat([g.ravel() for g in torch.autograd.grad(logp, parameters)]))
        logps.append(logp.detach())
    matrix = torch.stack(scores)
    return matrix @ matrix.T, torch.stack(logps)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", SCALING)
def test_every_row_has_the_factors_of_its_own_length(kind: str, seed: int) -> None:
    """Both engines and plain log-probs, in batches of rows on either side of the length, in any order."""
    model = scaled_model(kind)
    batch = random_batch(prompts=4, seed=seed)
    lengths = batch.attention_mask.sum(1)
    assert (lengths > ORIGINAL).any() and (lengths <= ORIGINAL).any()
    gram, logps = alone(model, batch)
    for engine in (FactoredEngine(model, trainable(model)), AutogradEngine(model, trainable(model))):
        assert relative_error(engine.gram(batch), gram) < 1e-9
        torch.testing.assert_close(engine.pairs(batch).logps, logps, rtol=0, atol=1e-9)
    torch.testing.assert_close(row_logps(model, batch), logps, rtol=0, atol=1e-9)
    backwards = select(batch, [3, 2, 1, 0, 7, 6, 5, 4], 2)
    torch.testing.assert_close(
        row_logps(model, backwards), logps[[3, 2, 1, 0, 7, 6, 5, 4]], rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("kind", SCALING)
def test_rows_on_one_side_go_the_fast_way(kind: str) -> None:
    """Short pairs share their prompts; long ones don't, and pairs on both sides are evaluated one row at a time."""
    model = scaled_model(kind)
    batch = random_batch(prompts=8, seed=1)
    lengths = batch.attention_mask.sum(1).view(2, 8)
    sides: dict[str, list[int]] = {"short": [], "long": [], "both": []}
    for i in range(8):
        long = (lengths[:, i] > ORIGINAL).tolist()
        sides["both" if len(set(long)) > 1 else "long" if long[0] else "short"].append(i)
    assert all(sides.values())
    for side, prompts in sides.items():
        part = select(batch, [k * 8 + i for k in range(2) for i in prompts], 2)
        engine = FactoredEngine(model, trainable(model))
        assert relative_error(engine.gram(part), alone(model, part)[0]) < 1e-9, side
        split = split_for(model, rows_for(model, part), 2, min_share=0.0)
        assert (split is not None) == (side == "short")
        one_by_one = any("one at a time" in note for note in engine.notes)
        dependent = any("depend on the length of the longest row" in note for note in engine.notes)
        assert dependent == (side != "short")
        assert one_by_one == (side == "both" or (side == "long" and kind == "dynamic"))


@pytest.mark.parametrize("kind", SCALING)
def test_products_of_tokens_have_them_too(kind: str) -> None:
    """A pair's tokens sum to the pair."""
    model = scaled_model(kind)
    for i in range(4):
        pair = select(random_batch(prompts=4, seed=2), [i, 4 + i], 2)
        products = token_products(model, trainable(model), pair)
        _, logps = alone(model, pair)
        found = torch.stack([products.chosen.logps.sum(), products.rejected.logps.sum()])
        torch.testing.assert_close(found, logps, rtol=0, atol=1e-9)


def test_groups() -> None:
    """Longrope has two sets of factors, dynamic NTK one for every length beyond the original; others have one."""
    lengths = torch.tensor([3, 9, 10, 14, 10])
    assert LengthFactors("longrope", 9).groups(lengths).tolist() == [0, 0, 1, 1, 1]
    assert LengthFactors("dynamic", 9).groups(lengths).tolist() == [9, 9, 10, 14, 10]
    assert length_factors(scaled_model("dynamic")) == {LengthFactors("dynamic", 9)}
    assert length_factors(scaled_model("longrope")) == {LengthFactors("longrope", 9)}
    plain = tiny_model("llama")
    assert not length_factors(plain) and [g.tolist() for g in alike(plain, lengths)] == [[0, 1, 2, 3, 4]]
    rows = Rows.from_batch(random_batch(), whole=True)
    assert rows.lengths.tolist() == random_batch().attention_mask.sum(1).tolist()
