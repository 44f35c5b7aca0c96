"""The named problems of the dense benchmark, with the work each one is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DenseProblem:
    """Self-attention of `batch` sequences: q [batch, seqlen, heads, head_dim], k and v alike with
    kv_heads."""

    batch: int
    heads: int
    kv_heads: int
    seqlen: int
    head_dim: int
    causal: bool
    dtype: str  # "bf16" | "fp16"

    @property
    def name(self) -> str:
        """As it is chosen on the command line: B16-H16-S2048-D64-causal-bf16."""
        mask = "causal" if self.causal else "full"
        heads = (
            f"H{self.heads}" if self.heads == self.kv_heads else f"H{self.heads}/{self.kv_heads}"
        )
        shape = f"B{self.batch}-{heads}-S{self.seqlen}-D{self.head_dim}"
        return f"{shape}-{mask}-{self.dtype}"

    @property
    def flops(self) -> float:
        """Multiplications and additions of both matrix products; a causal mask counts as half,
        the convention of FlashAttention's benchmarks."""
        full = 4.0 * self.batch * self.heads * self.seqlen**2 * self.head_dim
        return full / 2 if self.causal else full


_SHAPES = (  # batch, heads, seqlen, head_dim
    (16, 16, 2048, 64),
    (16, 16, 2048, 128),
    (4, 16, 8192, 64),
    (4, 16, 8192, 128),
    (1, 16, 32768, 128),
    (8, 8, 2048, 256),
)


def dense_problems(dtype: str) -> list[DenseProblem]:
    """The twelve problems that FlashAttention-3 is compared on: six shapes, full and causal."""
    return [
        DenseProblem(batch, heads, heads, seqlen, head_dim, causal, dtype)
        for batch, heads, seqlen, head_dim in _SHAPES
        for causal in (False, True)
    ]
