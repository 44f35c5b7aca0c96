"""What a model and a server ask of attention, and the refusal of what flashcore does not serve."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flashcore.kv_checks import FP8_DTYPES
from flashcore.planner.types import dims_text


class NotServed(ValueError):
    """An engine asks for something that flashcore lacks: refused when it starts."""

    def __init__(self, what: str, instead: str = "use another attention backend"):
        super().__init__(f"flashcore attention does not serve {what}; {instead}")


@dataclass(frozen=True)
class Options:
    """What an engine calls the options that refusals tell of.

    page_tokens, batch, tokens, queries: of a page's tokens, and of the `Limits` of that name.
    elsewhere: what to use where no option helps.
    """

    page_tokens: str
    batch: str
    tokens: str
    queries: str
    elsewhere: str


@dataclass(frozen=True)
class Shape:
    """Attention of one kind of layer as this rank sees it. v_head_dim: head_dim where it is 0."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "v_head_dim", self.v_head_dim or self.head_dim)

    def __str__(self) -> str:
        dims = dims_text(self.head_dim, self.v_head_dim)
        return f"{self.num_q_heads}/{self.num_kv_heads} heads of {dims}"


@dataclass(frozen=True)
class Model:
    """What the backend needs to know of a model runner.

    full, windowed: shapes of layers without and with a sliding window; None: no such layers.
    window: keys to the left of a query that a windowed layer sees, -1 without such layers.
    draft_tokens: query tokens of each sequence in target verify, 0 without speculation.
    dtype: of queries. kv_dtype: of the KV cache; None: dtype.
    """

    full: Shape | None
    windowed: Shape | None
    window: int
    page_tokens: int
    draft_tokens: int
    dtype: torch.dtype
    device: torch.device
    kv_dtype: torch.dtype | None = None

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of K and V in the cache."""
        return self.kv_dtype or self.dtype

    @property
    def fp8(self) -> bool:
        """K and V are fp8, with scales."""
        return self.cache_dtype in FP8_DTYPES

    @property
    def shapes(self) -> Iterator[Shape]:
        """Of the kinds of layers that there are."""
        return (shape for shape in (self.full, self.windowed) if shape is not None)


@dataclass(frozen=True)
class Limits:
    """The most that a forward of this server can have.

    batch: sequences, padding included. tokens: of one sequence. queries: new tokens of all
    sequences. graph_batch: sequences of a captured graph that has tables of its own. step: what
    batches are padded to a multiple of. batch_invariant: plans are, as `flashcore.plan` has it.
    """

    batch: int
    tokens: int
    queries: int
    graph_batch: int
    step: int = 2
    batch_invariant: bool = False
