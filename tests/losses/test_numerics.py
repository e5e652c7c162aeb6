"""The capped exponential and ln(1 - e^x): accurate where they are exact, tangent beyond."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch

from losses.numerics import EXPONENT_CAP, SURE, capped_exp, capped_expm1, log1mexp


def test_capped_exponentials_are_exact_below_the_cap() -> None:
    x = torch.tensor([-500.0, -1.0, -1e-12, 0.0, 1e-12, 1.0, 59.9], dtype=torch.float64)
    torch.testing.assert_close(capped_exp(x), x.exp(), rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(capped_expm1(x), x.expm1(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_capped_exponentials_go_on_along_their_tangent(dtype: torch.dtype) -> None:
    x = torch.tensor([EXPONENT_CAP + 1, EXPONENT_CAP + 5, 1e4], dtype=dtype, requires_grad=True)
    values = capped_exp(x)
    slope = math.exp(EXPONENT_CAP)
    torch.testing.assert_close(values, slope * (1 + x - EXPONENT_CAP), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, slope), rtol=1e-6, atol=0)
    assert values.isfinite().all()


@pytest.mark.parametrize("x", [-700.0, -40.0, -1.0, -0.7, -0.6931, -0.69, -1e-3, -1e-5, -2e-6])
def test_log1mexp_keeps_its_digits(x: float) -> None:
    """Against fifty decimal digits; near 0 the naive form has lost half of them."""
    with localcontext() as context:
        context.prec = 50
        expected = float((1 - Decimal(x).exp()).ln())
    found = log1mexp(torch.tensor(x, dtype=torch.float64)).item()
    assert found == pytest.approx(expected, rel=1e-13, abs=1e-300)


def test_log1mexp_is_finite_at_and_above_zero() -> None:
    x = torch.tensor([SURE, -1e-12, 0.0, 0.5], requires_grad=True)
    values = log1mexp(x)
    torch.testing.assert_close(values, torch.full_like(x, math.log(-math.expm1(SURE))), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(values.sum(), x)
    assert gradient.isfinite().all()
