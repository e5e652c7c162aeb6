"""Float32 matrix products on the CPU by oneDNN instead of PyTorch's default library (MKL), if that stays exact.

On CPUs with AVX-512 oneDNN's kernel is up to twice as fast. The only switch that leads there permits it to round
to bfloat16. A CPU without matrix units for bfloat16 (AMX) has no use for the permission and computes in float32;
one with AMX takes it, and loses five of eight digits. So the switch is measured before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from entangle.errors import UserError

TOLERANCE = 1e-5
"""Largest relative error of a product that still counts as float32; bfloat16 leaves 2e-3."""

SIZE = 512
"""Rows and columns of the matrices that are multiplied to see what the route computes."""


@contextmanager
def fast_gemm() -> Iterator[None]:
    """Within: float32 matrix products on the CPU take oneDNN's route. Other devices and precisions don't change.

    The setting belongs to the whole process; it is put back at the end, whatever happens in between.

    Raises:
        UserError: this PyTorch or this CPU doesn't have the route, or it would round to less than float32.
    """
    backend: Any = torch.backends.mkldnn
    if not (backend.is_available() and hasattr(backend, "matmul")):
        raise UserError(
            "The fast float32 matrix product needs PyTorch 2.9 or newer, built with oneDNN; this is PyTorch "
            f"{torch.__version__}. Run without it."
        )
    before = backend.matmul.fp32_precision
    try:
        backend.matmul.fp32_precision = "bf16"
        if not (error := product_error()) <= TOLERANCE:
            raise UserError(
                f"The fast float32 matrix product must be exact to {TOLERANCE:.0e}; on this CPU it rounds, to "
                f"{error:.0e}. Run without it."
            )
        yield
    finally:
        backend.matmul.fp32_precision = before


def product_error() -> float:
    """|AB - AB in float64| / |AB| of two random float32 matrices as this process multiplies them now."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SIZE, SIZE, generator=draw) for _ in range(2))
    exact = a.double() @ b.double()
    return float((a @ b - exact).norm() / exact.norm())
