"""What attention is asked for, as values that are handed on whole.

    Problem   shapes of a model's attention, as one rank sees them
    Rules     which keys a query sees and what its scores become
    KVPool    where K and V lie (paged)
    Packing   where packed sequences end (dense)
    Extras    tensors that a paged call may add
    Tables    what a paged call without a plan makes one of

The operators take them spelled out (`ops`), in the order of the fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from flashcore import validate

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Problem:
    """Shapes of a model's attention over pages; itemsize: bytes of a K or V element."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    page_tokens: int
    itemsize: int = 2

    @staticmethod
    def checked(
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int | None,
        page_tokens: int,
        itemsize: int,
    ) -> Problem:
        """From what a user gave, or a TypeError or ValueError naming the argument; v_head_dim is
        head_dim where it is None."""
        validate.head_counts(num_q_heads, num_kv_heads)
        v_head_dim = validate.head_dims(head_dim, v_head_dim)
        validate.positive_int("page_tokens", page_tokens)
        validate.positive_int("itemsize", itemsize, maximum=8)
        return Problem(num_q_heads, num_kv_heads, head_dim, v_head_dim, page_tokens, itemsize)

    @property
    def dims(self) -> tuple[int, int]:
        """head_dim and v_head_dim."""
        return self.head_dim, self.v_head_dim

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def kv_token_bytes(self) -> int:
        """K and V of one token, all KV heads."""
        return self.num_kv_heads * (self.head_dim + self.v_head_dim) * self.itemsize

    @property
    def partial_bytes(self) -> int:
        """A partial result of one query token, all query heads: fp32 rows, each with its LSE."""
        return self.num_q_heads * (4 * self.v_head_dim + 4)


class Rules(NamedTuple):
    """What of a score depends on the call and not on the tokens.

    scale multiplies scores. Window bounds of -1 do not bind; the right one has no say under a tree
    mask. softcap: 0 is off.
    """

    scale: float
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0

    @classmethod
    def of(
        cls, scale: float, causal: bool, window: tuple[int, int] = (-1, -1), softcap: float = 0.0
    ) -> Rules:
        """Rules with bounds that kernels can take: they have 32 bits, and no sequence is longer."""
        left, right = (-1 if bound >= validate.INT32_MAX else bound for bound in window)
        return cls(scale, causal, left, right, softcap)

    @property
    def windowed(self) -> bool:
        """Some bound binds."""
        return self.window_left >= 0 or self.window_right >= 0


class KVPool(NamedTuple):
    """k: [num_pages, page_tokens, num_kv_heads, head_dim]. v: the same with v_head_dim columns.
    k_scale, v_scale: of fp8 pages, fp32 () or [num_kv_heads]: an element means its value times the
    scale; None is 1."""

    k: torch.Tensor
    v: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


class Packing(NamedTuple):
    """cu_seqlens: int32 [batch + 1], None where sequences are not packed. max_seqlen_q: at least
    the longest query sequence, None where nobody knows, which only costs empty tiles."""

    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int | None = None


class Extras(NamedTuple):
    """As in `flashcore.paged_attention`."""

    sinks: torch.Tensor | None = None
    tree_mask: torch.Tensor | None = None
    tree_positions: torch.Tensor | None = None


class Tables(NamedTuple):
    """As in `flashcore.paged_attention`."""

    page_table: torch.Tensor | None = None
    seq_lens: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None


UNPACKED = Packing()
NO_EXTRAS = Extras()
