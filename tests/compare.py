"""One comparison for every path: NaN and inf first, then relative errors with limits per dtype."""

from __future__ import annotations

import torch

RELATIVE_LIMIT = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
"""Frobenius norm of the error over that of the exact result. fp32 is the library's promise; the
others leave room for twice the rounding of the output to that dtype."""


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of `expected` (absolute where it is 0)."""
    norm = expected.double().norm()
    return float((actual.double() - expected.double()).norm() / (norm if norm > 0 else 1.0))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """`actual` is finite where `expected` is, infinite alike elsewhere, within `dtype`'s limit."""
    assert actual.shape == expected.shape
    finite = torch.isfinite(expected)
    wrong = (torch.isfinite(actual) != finite).nonzero()
    assert not len(wrong), f"finite in only one of both at {wrong[0].tolist()}"
    assert torch.equal(actual[~finite].double(), expected[~finite].double())
    a, e = actual[finite], expected[finite]
    error = relative_error(a, e)
    worst = (a.double() - e.double()).abs()
    where = int(worst.argmax()) if worst.numel() else 0
    assert error <= RELATIVE_LIMIT[dtype], (
        f"relative error {error:.2e} over {RELATIVE_LIMIT[dtype]:.0e}; worst finite element "
        f"{where}: {a[where].item()} for {e[where].item()}"
    )


def assert_lse_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """As `assert_close` in fp32, for logarithms: one near 0 is no more exact than one near 1."""
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(actual), finite)
    assert torch.equal(actual[~finite].double(), expected[~finite].double())
    a, e = actual[finite].double(), expected[finite].double()
    error = float((a - e).norm() / (e.square() + 1).sum().sqrt().clamp(min=1))
    assert error <= RELATIVE_LIMIT[torch.float32], error
