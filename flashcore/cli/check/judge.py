"""What a test of `flashcore check` is, and when a result is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

# The error of a query's row over the row's norm, root mean square over the rows, in float64: every
# query counts the same, however many keys its result is the mean of. Rounding P and the output to
# the dtype costs about 2e-3 in bf16 and 3e-4 in fp16; twice that is a bug.
OUT_LIMIT = {"bf16": 5e-3, "fp16": 7e-4, "fp32": 1e-5}
LSE_LIMIT = 2e-4  # absolute; scores are sums of exact products in fp32

TORCH_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Setting(NamedTuple):
    """Where a test runs, and the seed of its inputs.

    kernels: our kernels are launched there; otherwise torch operators.
    """

    device: str
    seed: int = 0
    kernels: bool = True


class Finding(NamedTuple):
    """What is wrong, "" for nothing, and what was measured."""

    problem: str
    detail: str = ""


@dataclass(frozen=True)
class SelfTest:
    """One line of the report.

    launch: everything that asks for kernels; what it returns goes to `judge`. It is also called
        with kernels that do nothing, to learn which they are, and its result is then dropped.
    """

    name: str
    launch: Callable[[Setting], Any]
    judge: Callable[[Any], Finding]
    needs_kernels: bool = False
    least_gpus: int = 0


def judge(
    found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], dtype: str
) -> Finding:
    """Output, and LSE where there is one, beside those of the float64 reference."""
    import torch

    (out, *lses), (expected_out, *expected_lses) = found, expected
    limit = OUT_LIMIT[dtype]
    # Rows that see no key are zeros, where any error counts in full.
    norms = expected_out.norm(dim=-1)
    errors = (out.double() - expected_out).norm(dim=-1) / torch.where(norms > 0, norms, 1.0)
    error = float(errors.square().mean().sqrt())
    detail = f"error {error:.1e} (limit {limit:.0e})"
    lse_right = True
    for lse, right in zip(lses, expected_lses, strict=True):
        finite = right.isfinite()
        lse_error = float((lse.double() - right)[finite].abs().max()) if finite.any() else 0.0
        detail += f"  lse {lse_error:.1e} (limit {LSE_LIMIT:.0e})"
        lse_right = bool((lse.isfinite() == finite).all()) and lse_error <= LSE_LIMIT
    if not error <= limit:  # also where it is not a number
        return Finding("the output is wrong", detail)
    return Finding("" if lse_right else "the LSE is wrong", detail)


def worst(findings: list[Finding]) -> Finding:
    """The first of them with a problem, else the one with the largest numbers."""
    return next((f for f in findings if f.problem), max(findings, key=lambda f: f.detail))
