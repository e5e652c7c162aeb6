"""The streamed Gram matrix equals the one of a single batch, however rows are cut and held."""

from __future__ import annotations

import pytest
import torch

from entangle.scores import AutogradEngine, Directions, Engine, FactoredEngine, HeldScores, Metric, score_gram
from entangle.scores.directions import directions_at_a_time
from entangle.scores.rows import RowBatch
from tests.architectures import random_batch, select, tiny_model, trainable, with_lora


class Counting(AutogradEngine):
    """Counts the batches that it runs."""

    runs = 0

    def scores(self, batch: RowBatch) -> dict[str, torch.Tensor]:
        """See `Engine.scores`."""
        self.runs += 1
        return super().scores(batch)


def pairs_apart(batch: RowBatch) -> tuple[list[RowBatch], list[int]]:
    """One batch per pair, and where its rows stood."""
    n = len(batch.prompt_length)
    return [select(batch, [i, n + i], 2) for i in range(n)], [r for i in range(n) for r in (i, n + i)]


@pytest.mark.parametrize("engine", [AutogradEngine, FactoredEngine])
@pytest.mark.parametrize("memory", [0, 2 * 2 * 1000 * 8, 2**30])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_one_batch(engine: type[Engine], memory: int, weighted: bool) -> None:
    """Memory for one batch, for some, for all."""
    model = with_lora(tiny_model("llama"), target_modules=["q_proj", "down_proj"])
    parameters = trainable(model)
    batch = random_batch(prompts=4)
    batches, order = pairs_apart(batch)
    metric = {n: torch.rand_like(p) + 0.1 for n, p in parameters.items()} if weighted else None
    expected = AutogradEngine(model, parameters).gram(batch, metric=metric)
    gram = score_gram(engine(model, parameters), batches, metric=metric, memory=memory)
    torch.testing.assert_close(gram, expected[order][:, order], rtol=0, atol=1e-9)


def products(
    engine: Engine, batches: list[RowBatch], weights: torch.Tensor, metric: Metric | None, memory: int
) -> torch.Tensor:
    """In two passes, the sums of every other batch apart, as by two processes."""
    held, sums = HeldScores(engine, memory), (Directions(), Directions())
    parts = weights.split([len(batch.input_ids) for batch in batches], 1)
    for number, (batch, part) in enumerate(zip(batches, parts, strict=True)):
        sums[number % 2].add(held.of(number, batch), part)
    total = Directions()
    for each in sums:
        total.merge(each)
    total = total.under(metric)
    return torch.cat([total.products(held.of(number, batch)) for number, batch in enumerate(batches)])


@pytest.mark.parametrize("engine", [AutogradEngine, FactoredEngine])
@pytest.mark.parametrize("memory", [0, 2 * 2 * 1000 * 8, 2**30])
@pytest.mark.parametrize("weighted", [False, True])
def test_products_are_the_gram_matrix_times_the_weights(
    engine: type[Engine], memory: int, weighted: bool
) -> None:
    """However many scores are held, whoever sums them, and in whatever metric."""
    model = with_lora(tiny_model("llama"), target_modules=["q_proj", "down_proj"])
    parameters = trainable(model)
    batches, _ = pairs_apart(random_batch(prompts=4))
    metric = {n: torch.rand_like(p) + 0.1 for n, p in parameters.items()} if weighted else None
    made = engine(model, parameters)
    weights = torch.randn(3, 8, dtype=torch.float64)
    expected = score_gram(made, batches, metric=metric) @ weights.T
    found = products(made, batches, weights, metric, memory)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_products_cost_two_passes_or_one() -> None:
    model = tiny_model("gpt2").requires_grad_(True)
    parameters = {"transformer.wpe.weight": model.transformer.wpe.weight}
    theta = 64 * 16 * 8
    for memory, runs in ((2**30, 4), (0, 8), (2 * theta, 7)):  # the last keeps one batch
        engine = Counting(model, parameters)
        products(engine, pairs_apart(random_batch(prompts=4))[0], torch.eye(3, 8).double(), None, memory)
        assert engine.runs == runs
    assert [directions_at_a_time(engine, memory) for memory in (0, theta, 2 * theta + 1)] == [1, 1, 2]


def test_a_single_batch_is_a_set_too() -> None:
    model, batch = with_lora(tiny_model("llama")), random_batch()
    engine = FactoredEngine(model, trainable(model))
    torch.testing.assert_close(score_gram(engine, [batch]), engine.gram(batch), rtol=0, atol=1e-9)


def test_passes() -> None:
    """All batches once if they fit; else each block once and what comes after it again."""
    model = tiny_model("gpt2").requires_grad_(True)
    parameters = {"transformer.wpe.weight": model.transformer.wpe.weight}
    per_batch = 2 * 64 * 16 * 8
    for memory, runs in ((2**30, 4), (0, 4 + 3 + 2 + 1), (2 * per_batch, 4 + 2)):
        engine = Counting(model, parameters)
        score_gram(engine, pairs_apart(random_batch(prompts=4))[0], memory=memory)
        assert engine.runs == runs


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_scores_are_the_oracles(name: str) -> None:
    """Written out, by name; a parameter that plays no part has zeros."""
    model, batch = tiny_model(name).requires_grad_(True), random_batch()
    model.register_parameter("idle", torch.nn.Parameter(torch.ones(3, dtype=torch.float64)))
    fast = FactoredEngine(model, trainable(model), fallback=True).scores(batch)
    slow = AutogradEngine(model, trainable(model)).scores(batch)
    assert fast.keys() == slow.keys() and (fast["idle"] == 0).all()
    for parameter in slow:
        torch.testing.assert_close(fast[parameter], slow[parameter], rtol=1e-10, atol=1e-10)
