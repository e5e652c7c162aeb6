"""The fast matrix product: the same scores, refused where it would round, and never left switched on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from entangle.errors import UserError
from entangle.scores import FactoredEngine, fast_gemm
from entangle.scores.gemm import TOLERANCE, product_error
from tests.architectures import random_batch, tiny_model, trainable, with_lora
from tests.scores.test_architectures import relative_error

ROUTE: Any = getattr(torch.backends.mkldnn, "matmul", None)

pytestmark = pytest.mark.skipif(ROUTE is None, reason="needs PyTorch 2.9 or newer with oneDNN")


@pytest.fixture
def route() -> None:
    """Skips where the CPU would round."""
    try:
        with fast_gemm():
            pass
    except UserError as error:
        pytest.skip(str(error))


def setting() -> str:
    return ROUTE.fp32_precision


@pytest.mark.usefixtures("route")
def test_scores_are_the_same_to_1e_5():
    model, batch = with_lora(tiny_model("llama", torch.float32)), random_batch()
    engine = FactoredEngine(model, trainable(model))
    plain = engine.gram(batch)
    with fast_gemm():
        fast = engine.gram(batch)
    assert relative_error(fast, plain) < 1e-5


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("before", ["none", "ieee"])
def test_setting_is_put_back(before):
    at_start = setting()
    try:
        ROUTE.fp32_precision = before
        with fast_gemm():
            assert setting() == "bf16"
        assert setting() == before
        with pytest.raises(ZeroDivisionError), fast_gemm():
            raise ZeroDivisionError
        assert setting() == before
    finally:
        ROUTE.fp32_precision = at_start


@pytest.mark.parametrize("error", [2e-3, float("nan")])
def test_rounding_is_refused(error, monkeypatch):
    """As on a CPU with AMX, where the permission to round is used."""
    monkeypatch.setattr("entangle.scores.gemm.product_error", lambda: error)
    before = setting()
    with pytest.raises(UserError, match="Run without it"), fast_gemm():
        raise AssertionError("the body must not run")
    assert setting() == before


def test_error_is_measured_against_float64(monkeypatch):
    """Real bfloat16 rounding is found: the matrices are what the route would make of them."""
    assert product_error() < 1e-6 < TOLERANCE
    draw = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *size, **kw: Rounding(draw(*size, **kw)))
    assert product_error() > 10 * TOLERANCE


class Rounding(torch.Tensor):
    """A matrix whose float32 products round to bfloat16."""

    def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
        a, b = self.as_subclass(torch.Tensor), other.as_subclass(torch.Tensor)
        return (a.bfloat16() @ b.bfloat16()).float() if a.dtype == torch.float32 else a @ b


def test_without_the_route_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch 2.9 or newer"), fast_gemm():
        raise AssertionError("the body must not run")
