"""Products of token scores against a plain autograd loop, in float64: one backward pass per token."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from entangle.errors import UserError
from entangle.scores import AutogradEngine, token_logps
from entangle.scores import tokens as module
from entangle.scores.base import studying
from entangle.scores.float64 import KeepFloat64
from entangle.scores.rows import RowBatch
from entangle.scores.tokens import TokenProducts, token_matrix, token_products
from tests.architectures import ARCHITECTURES, random_batch, tiny_model, trainable, with_lora

Parameters = dict[str, nn.Parameter]


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    """Norms of transformers compute in float32 by themselves: their rounding would drown differences of 1e-9."""
    with KeepFloat64():
        yield


def one_pair(
    seed: int = 0, side: str = "right", prompt: int = 6, lengths: tuple[int, int] = (4, 5)
) -> RowBatch:
    """A pair of random responses to one prompt, padded."""
    draw = torch.Generator().manual_seed(seed)
    head = torch.randint(3, 48, (prompt,), generator=draw).tolist()
    tails = [torch.randint(3, 48, (n,), generator=draw).tolist() for n in lengths]
    return pair_of(head, *tails, side=side)


def pair_of(head: list[int], chosen: list[int], rejected: list[int], side: str = "right") -> RowBatch:
    width = len(head) + max(len(chosen), len(rejected)) + 2
    ids, attention, completion = (torch.zeros(2, width, dtype=torch.int64) for _ in range(3))
    for i, tail in enumerate((chosen, rejected)):
        length = len(head) + len(tail)
        start = width - length if side == "left" else 0
        ids[i, start : start + length] = torch.tensor(head + tail)
        attention[i, start : start + length] = 1
        completion[i, start + len(head) : start + length] = 1
    return RowBatch(ids, attention, completion, torch.tensor([len(head)]))


def loop(model: nn.Module, parameters: Parameters, batch: RowBatch) -> Tensor:
    """Every scored token's gradient, chosen ones first, `(T_w + T_l, theta)`: the oracle."""
    grid = batch.scored
    with studying(model, parameters):
        values = token_logps(model, batch)[grid]
        rows = [
            torch.autograd.grad(
                v, list(parameters.values()), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for v in values
        ]
    return torch.stack([torch.cat([g.ravel() for g in row]) for row in rows]).double()


def check(found: TokenProducts, gradients: Tensor, tolerance: float = 1e-9) -> None:
    """All products equal the oracle's, relative to the two lengths that are multiplied."""
    n = len(found.chosen.ids)
    chosen, rejected = gradients[:n].sum(0), gradients[n:].sum(0)
    sizes = gradients.norm(dim=1)
    for side, rows in ((found.chosen, slice(None, n)), (found.rejected, slice(n, None))):
        for name, direction in (
            ("chosen", chosen),
            ("rejected", rejected),
            ("difference", chosen - rejected),
        ):
            scale = sizes[rows] * max(chosen.norm(), rejected.norm())
            error = getattr(side, f"along_{name}") - gradients[rows] @ direction
            assert (error.abs() <= tolerance * scale).all(), name
    if found.matrix is not None:
        error = found.matrix - gradients @ gradients.T
        assert (error.abs() <= tolerance * sizes[:, None] * sizes).all()


def lora_case(name: str) -> tuple[nn.Module, Parameters]:
    model = with_lora(tiny_model(name))
    return model, trainable(model)


def full_case(name: str) -> tuple[nn.Module, Parameters]:
    model = tiny_model(name)
    return model, dict(model.named_parameters())


CASES = {"lora": lora_case, "full": full_case}
ROUNDED = {"bloom": 1e-6, "gemma2": 2e-6}
"""Architectures that round to float32 in a way that can't be switched off here, with the error that leaves."""

MIXED = (
    "mixtral",
    "qwen3_moe",
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in MIXED])
def test_sums_and_matrix_equal_the_loop(name, case):
    model, parameters = CASES[case](name)
    batch = one_pair(seed=1)
    found = token_products(model, parameters, batch, full=name in ("llama", "gpt2", "qwen2", "llama_tied"))
    check(found, loop(model, parameters, batch), ROUNDED.get(name, 1e-9))
    assert not found.notes


@pytest.mark.parametrize("name", MIXED)
def test_mixtures_of_experts_equal_the_loop(name):
    model, parameters = full_case(name)
    batch = one_pair(seed=1)
    tolerance = 1e-7 if name == "qwen3_moe" else 1e-9  # its router computes in float32
    check(token_products(model, parameters, batch), loop(model, parameters, batch), tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("prompt", [1, 2, 20])
def test_prompt_padding_and_sharing_change_nothing(side, share_prompt, prompt):
    model, parameters = lora_case("gpt2")
    batch = one_pair(seed=2, side=side, prompt=prompt, lengths=(5, 2))
    found = token_products(model, parameters, batch, share_prompt=share_prompt)
    check(found, loop(model, parameters, batch))
    assert not found.notes


@pytest.mark.parametrize("case", CASES)
def test_sums_by_both_modes_and_of_the_matrix_agree(case, monkeypatch):
    """One backward per token (matrix), differentiating twice, and forward mode: three ways to the same numbers."""
    model, parameters = CASES[case]("llama")
    batch = one_pair(seed=3)
    twice = token_products(model, parameters, batch, full=True)
    monkeypatch.setattr(
        module.Passes, "products", lambda *_: (_ for _ in ()).throw(RuntimeError("no derivative"))
    )
    forward = token_products(model, parameters, batch)
    assert any("forward-mode" in note for note in forward.notes) and not twice.notes
    matrix, n = twice.matrix, len(twice.chosen.ids)
    scale = float(matrix.sum().abs()) + float(twice.geometry.sq_chosen)
    by_matrix = {"chosen": (matrix[:n, :n], matrix[:n, n:]), "rejected": (matrix[n:, :n], matrix[n:, n:])}
    for side, (chosen, rejected) in by_matrix.items():
        for found in (twice, forward):
            torch.testing.assert_close(
                getattr(found, side).along_chosen, chosen.sum(1), rtol=0, atol=1e-9 * scale
            )
            torch.testing.assert_close(
                getattr(found, side).along_rejected, rejected.sum(1), rtol=0, atol=1e-9 * scale
            )


def test_wrong_products_are_noticed_and_forward_mode_steps_in(monkeypatch):
    model, parameters = lora_case("llama")
    batch = one_pair(seed=3)
    right = module.Passes.products
    monkeypatch.setattr(module.Passes, "products", lambda self, u: 1.1 * right(self, u))
    found = token_products(model, parameters, batch)
    assert found.notes
    check(found, loop(model, parameters, batch))


def test_model_without_any_second_derivative_is_refused(monkeypatch):
    model, parameters = lora_case("llama")

    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return 2 * g

    norm = model.get_base_model().model.norm
    norm.register_forward_hook(lambda _, __, output: Opaque.apply(output))
    with pytest.raises(UserError, match="without quantisation"):
        token_products(model, parameters, one_pair())


@pytest.mark.parametrize(
    "tails", [([7, 8, 9], [20, 21]), ([20, 21], [7, 8, 9])]
)  # either score may be shorter
def test_sums_are_the_pairs_geometry(tails):
    """Sum S = A, sum R = c from either side, sum over the rejected along g_l = B; gaps from the difference."""
    model, parameters = full_case("qwen2")
    batch = pair_of([5, 6, 7], *tails)
    found, expected = token_products(model, parameters, batch), AutogradEngine(model, parameters).pairs(batch)
    block = expected.geometry
    scale = float((block.sq_chosen * block.sq_rejected).sqrt())
    sums = {
        "sq_chosen": found.chosen.along_chosen,
        "inner": found.chosen.along_rejected,
        "sq_rejected": found.rejected.along_rejected,
        "gap_chosen": found.chosen.along_difference,
        "gap_rejected": -found.rejected.along_difference,
    }
    for name, values in sums.items():
        assert float(values.sum()) == pytest.approx(getattr(block, name).item(), abs=1e-9 * scale), name
        assert getattr(found.geometry, name).item() == pytest.approx(
            getattr(block, name).item(), abs=1e-9 * scale
        )
    assert float(found.rejected.along_chosen.sum()) == pytest.approx(block.inner.item(), abs=1e-9 * scale)
    logps = [float(side.logps.sum()) for side in (found.chosen, found.rejected)]
    assert logps == pytest.approx(expected.logps.tolist(), abs=1e-9)


def test_tokens_of_the_shared_prefix_have_identical_rows():
    model, parameters = lora_case("llama")
    batch = pair_of([5, 6, 7], [10, 11, 12, 20, 21], [10, 11, 30, 20, 21])
    found = token_products(model, parameters, batch, full=True)
    assert (found.shared_prefix, found.shared_suffix) == (2, 2)
    for name in ("logps", "along_chosen", "along_rejected", "along_difference"):
        chosen, rejected = (getattr(side, name) for side in (found.chosen, found.rejected))
        torch.testing.assert_close(chosen[:2], rejected[:2], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(chosen[3:], rejected[3:], rtol=1e-3, atol=1e-3)
    cosines = found.cosines
    torch.testing.assert_close(cosines.diagonal()[:2], torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-9)
    assert cosines.shape == (5, 5) and float(cosines.abs().max()) <= 1 + 1e-9


def test_identical_responses_share_a_prefix_and_no_suffix():
    model, parameters = lora_case("llama")
    found = token_products(model, parameters, pair_of([5, 6], [7, 8, 9], [7, 8, 9]))
    assert (found.shared_prefix, found.shared_suffix) == (3, 0)
    assert not found.chosen.along_difference.any()


def test_last_layer_has_a_closed_form():
    """M[t, t'] = <e_t - p_t, e_t' - p_t'> <h_t, h_t'> for the LM head alone: one forward pass, no backward."""
    model = tiny_model("gpt2", tie_word_embeddings=False)
    head = model.get_output_embeddings()
    batch = one_pair(seed=5)
    found = token_products(model, {"lm_head.weight": head.weight}, batch, full=True)
    kept = []
    handle = head.register_forward_hook(lambda _, args, output: kept.append((args[0], output)))
    with torch.no_grad():
        model(input_ids=batch.input_ids)
    handle.remove()
    hidden, logits = (value[:, :-1][batch.scored] for value in kept[0])
    error = nn.functional.one_hot(batch.input_ids[:, 1:][batch.scored], 48) - logits.softmax(-1)
    expected = (error @ error.T) * (hidden @ hidden.T)
    torch.testing.assert_close(found.matrix, expected, rtol=1e-9, atol=1e-9)
    n = len(found.chosen.ids)
    torch.testing.assert_close(found.chosen.along_rejected, expected[:n, n:].sum(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.chosen_chosen, expected[:n, :n], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.chosen_rejected, expected[:n, n:], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.rejected_rejected, expected[n:, n:], rtol=1e-9, atol=1e-9)


def test_predicted_changes_are_those_of_a_real_step():
    """Theta += eta (d_w g_w - d_l g_l): error of the prediction is O(eta), so halving eta halves it."""
    model, parameters = lora_case("gpt2")
    batch, incentives = one_pair(seed=6), (0.7, 0.2)
    found = token_products(model, parameters, batch)
    predicted = torch.cat(found.changes(*incentives))
    gradients, n = loop(model, parameters, batch), len(found.chosen.ids)
    step = incentives[0] * gradients[:n].sum(0) - incentives[1] * gradients[n:].sum(0)
    before = {name: p.detach().clone() for name, p in parameters.items()}

    def change(rate: float) -> Tensor:
        with torch.no_grad():
            start = token_logps(model, batch)[batch.scored]
            nn.utils.vector_to_parameters(
                torch.cat([p.ravel() for p in before.values()]) + rate * step, list(parameters.values())
            )
            moved = token_logps(model, batch)[batch.scored]
            for name, p in parameters.items():
                p.copy_(before[name])
        return (moved - start) / rate

    errors = [(change(rate) - predicted).norm() for rate in (1e-4, 5e-5)]
    assert errors[1] < 1e-2 * predicted.norm()
    assert 1.9 < float(errors[0] / errors[1]) < 2.1


def test_difference_keeps_digits_that_subtraction_loses():
    """Nearly equal scores in float32: the gap's own direction beats the difference of two products."""
    chosen, rejected = [10, 11, 12, 13, 14, 15, 16, 17], [10, 11, 12, 13, 14, 15, 16, 18]
    exact_model = tiny_model("gpt2")
    with torch.no_grad():  # both last tokens nearly alike
        table = exact_model.get_output_embeddings().weight
        table[18] = table[17] * (1 + 1e-4)
    batch = pair_of([5, 6, 7], chosen, rejected)
    exact = token_products(exact_model, dict(exact_model.named_parameters()), batch)
    model = exact_model.float()
    found = token_products(model, dict(model.named_parameters()), batch)
    truth = exact.rejected.along_difference
    error = (found.rejected.along_difference - truth).norm()
    assert error < 1e-5 * truth.norm()
    block = found.geometry
    assert float(block.cosine) < 1


def test_model_is_left_as_it_was():
    model, parameters = lora_case("llama")
    model.train()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    token_products(model, parameters, one_pair(), full=True)
    assert model.training
    for name, p in model.named_parameters():
        assert p.grad is None and p.requires_grad == (name not in frozen)
        assert torch.equal(p, weights[name])


@pytest.mark.parametrize("memory", [0, 9 * 8 * 200, 2**31])
def test_matrix_does_not_depend_on_the_memory_it_may_take(memory):
    model, parameters = lora_case("qwen2")
    batch = one_pair(lengths=(4, 5))
    gradients = loop(model, parameters, batch)
    matrix = token_matrix(model, parameters, batch, memory=memory)
    torch.testing.assert_close(matrix, gradients @ gradients.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (random_batch(2), "got 4 rows"),
        (random_batch(2, group_size=1), "group_size 1"),
        (pair_of([5], [6], []), r"scored tokens \[1, 0\]"),
    ],
)
def test_anything_but_one_pair_is_refused(batch, reason):
    model, parameters = lora_case("llama")
    with pytest.raises(ValueError, match=reason):
        token_products(model, parameters, batch)
