"""Global tensors that a paged kernel reads and writes as they are; K and V come by other ways."""

from __future__ import annotations

from typing import NamedTuple

import cutlass.cute as cute


class Operands(NamedTuple):
    """By the names that `contract.operands.Paged` gives them."""

    q: cute.Tensor
    out: cute.Tensor
    lse: cute.Tensor
    partial_out: cute.Tensor
    partial_lse: cute.Tensor
    cols: cute.Tensor
    work: cute.Tensor
    q_tokens: cute.Tensor
    q_positions: cute.Tensor
    q_index: cute.Tensor | None
    tree_mask: cute.Tensor | None
    tree_positions: cute.Tensor | None
    sinks: cute.Tensor | None
    k_scale: cute.Tensor | None
    v_scale: cute.Tensor | None
    counter: cute.Tensor
    counts: cute.Tensor | None
