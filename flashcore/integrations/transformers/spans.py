"""Which query rows of a batch see which key rows: the mask that `flashcore` layers are given.

`find_spans` runs once per forward and kind of layer, on the host. The padding mask is read there
(one wait for the device); nothing of the size queries x keys is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask

from flashcore.integrations.transformers.rules import Rules


@dataclass(frozen=True)
class Sizes:
    """Of one attention call. Offsets are the positions of the first query and of the first key."""

    batch: int
    queries: int
    keys: int
    query_offset: int = 0
    key_offset: int = 0

    @property
    def first_query(self) -> int:
        """The first query's position, counted from the first key's."""
        return self.query_offset - self.key_offset


class Spans(BlockMask):
    """The mask of a layer as spans of rows.

    A BlockMask is what transformers hands on as it is, from `generate` and from a model to its
    layers, where it is no tensor; this one has its own fields only. One of four forms:

        nothing more     every query row and every key row of the batch take part
        k_ends           each sequence has one run of rows; the others take no part. cu_seqlens_q
                         [5 batch + 1] and k_ends [batch, 4] bound five sequences in each row of
                         the batch: queries before the run, keys before it, the run, queries behind
                         it, keys behind it. Only the run has both, so shapes depend on no value
        q_rows, k_rows   (batch index, position) of each row that takes part, for runs with holes
        cu_seqlens_k     sequences packed one behind the other, all rows take part
    """

    def __init__(
        self,
        sizes: Sizes,
        rules: Rules,
        window: tuple[int, int],
        *,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_k: torch.Tensor | None = None,
        k_ends: torch.Tensor | None = None,
        q_rows: tuple[torch.Tensor, ...] | None = None,
        k_rows: tuple[torch.Tensor, ...] | None = None,
    ) -> None:
        self.sizes = (sizes.batch, sizes.queries, sizes.keys)
        self.causal = rules.causal
        self.window = window  # (-1, -1) where it excludes no key
        self.left = rules.left  # the window's bound that the layer has, excluding keys or not
        self.cu_seqlens_q = cu_seqlens_q
        self.cu_seqlens_k = cu_seqlens_k
        self.k_ends = k_ends
        self.q_rows = q_rows
        self.k_rows = k_rows

    @property
    def all_rows(self) -> bool:
        """Every row takes part: neither padding nor the unused end of a static cache."""
        return self.k_ends is None and self.k_rows is None

    @property
    def shape(self) -> tuple[int, ...]:
        """As of a dense mask, which transformers looks at to know a mask that is made already."""
        batch, queries, keys = self.sizes
        return batch, 1, queries, keys

    def to(self, *args: Any, **kwargs: Any) -> Spans:
        """The same on another device, for models that are spread over several."""
        moved = object.__new__(Spans)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                value = value.to(*args, **kwargs)
            elif name in ("q_rows", "k_rows") and value is not None:
                value = tuple(rows.to(*args, **kwargs) for rows in value)
            setattr(moved, name, value)
        return moved

    def __getitem__(self, index: object) -> Any:
        raise NotImplementedError(
            "attention_mask: this model cuts its attention mask, which has no dense form with "
            "attn_implementation='flashcore'; use attn_implementation='sdpa'"
        )

    def __repr__(self) -> str:
        batch, queries, keys = self.sizes
        return f"Spans({batch=}, {queries=}, {keys=}, causal={self.causal}, window={self.window})"

    __str__ = __repr__


def find_spans(
    rules: Rules, sizes: Sizes, padding: torch.Tensor | None, device: torch.device
) -> Spans:
    """The spans of a layer with these rules.

    Args:
        padding: bool [batch, positions], from position 0 on; positions behind its end are padding.
            None: no padding.

    Raises:
        NotImplementedError: where the rules over this padding are no spans, naming the reason.
    """
    if rules.chunk is not None and sizes.key_offset + sizes.keys > rules.chunk:
        raise _refused(
            f"attention_chunk_size={rules.chunk} binds at {sizes.key_offset + sizes.keys} "
            "positions; flashcore has windows, but no chunks"
        )
    used = _used_keys(rules, sizes)
    window = _binding_window(rules, sizes, used)
    if rules.segments is not None:
        return _packed(rules, sizes, window, padding)
    valid = None if padding is None else _valid_keys(padding, sizes, used)
    runs = None if valid is None else _runs(valid)
    if runs is None:
        if used == sizes.keys:
            return Spans(sizes, rules, window)
        runs = [(0, used, used)] * sizes.batch
    if any(end - begin != count for begin, end, count in runs):
        assert valid is not None
        return _with_holes(valid, sizes, rules, window)
    k_ends, q_ends = [], [0]
    for row, (begin, end, _) in enumerate(runs):
        first, last = _queries_of_run(begin, end, sizes, rules.causal, window)
        k_ends.append((0, begin, end, end))
        ends = (first, first, last, sizes.queries, sizes.queries)
        q_ends += [row * sizes.queries + x for x in ends]
    return Spans(
        sizes,
        rules,
        window,
        cu_seqlens_q=torch.tensor(q_ends, dtype=torch.int32).to(device, non_blocking=True),
        k_ends=torch.tensor(k_ends, dtype=torch.int32).to(device, non_blocking=True),
    )


def _used_keys(rules: Rules, sizes: Sizes) -> int:
    """Leading key rows that some query may see: a static cache has more rows than are filled."""
    if not rules.causal:
        return sizes.keys
    used = sizes.first_query + sizes.queries
    if sizes.first_query < 0 or used > sizes.keys:
        raise _refused(
            f"queries at positions {sizes.query_offset} to "
            f"{sizes.query_offset + sizes.queries - 1} on keys at {sizes.key_offset} to "
            f"{sizes.key_offset + sizes.keys - 1}, of which their own must be the last that count "
            "(a static cache of a window may keep too few: use a DynamicCache)"
        )
    return used


def _binding_window(rules: Rules, sizes: Sizes, used: int) -> tuple[int, int]:
    """(left, right) as `flashcore.attention` has them, without bounds that exclude no key."""
    span = used if rules.causal else max(sizes.queries, sizes.keys)
    left, right = (-1 if bound >= span - 1 else bound for bound in (rules.left, rules.right))
    if (left, right) != (-1, -1) and sizes.first_query + sizes.queries != used:
        raise _refused("a window where queries and keys do not end at the same position")
    return left, right


def _valid_keys(padding: torch.Tensor, sizes: Sizes, used: int) -> torch.Tensor:
    """bool [batch, used]: the keys that are no padding."""
    positions = padding[:, sizes.key_offset : sizes.key_offset + used]
    return torch.nn.functional.pad(positions, (0, used - positions.shape[1]))


def _runs(valid: torch.Tensor) -> list[tuple[int, int, int]] | None:
    """(first, end, number) of the valid keys of each row; None where all are valid."""
    batch, used = valid.shape
    if valid.numel() == 0:
        return [(0, 0, 0)] * batch
    ones = valid.int()
    found = torch.stack([ones.argmax(1), used - ones.flip(1).argmax(1), ones.sum(1)], 1).tolist()
    if all(count == used for _, _, count in found):
        return None
    return [(first, end, count) if count else (0, 0, 0) for first, end, count in found]


def _queries_of_run(
    begin: int, end: int, sizes: Sizes, causal: bool, window: tuple[int, int]
) -> tuple[int, int]:
    """The query rows that go with keys begin to end: those that are no padding themselves.

    Without a causal mask or a window it does not matter where a query stands: all of them see the
    keys, those of cross attention among them, whose padding is not known.
    """
    if not causal and window == (-1, -1):
        return 0, sizes.queries
    last = min(max(end - sizes.first_query, 0), sizes.queries)
    return min(max(begin - sizes.first_query, 0), last), last


def _with_holes(valid: torch.Tensor, sizes: Sizes, rules: Rules, window: tuple[int, int]) -> Spans:
    """Rows to gather: the order of the valid tokens is all that a causal mask depends on."""
    if window != (-1, -1):
        raise _refused("attention_mask has padding between tokens of a layer with a window")
    all_queries = valid.new_ones(sizes.batch, sizes.queries)
    queries = valid[:, sizes.first_query :] if rules.causal else all_queries
    return Spans(
        sizes,
        rules,
        window,
        cu_seqlens_q=_ends(queries),
        cu_seqlens_k=_ends(valid),
        q_rows=queries.nonzero(as_tuple=True),
        k_rows=valid.nonzero(as_tuple=True),
    )


def _ends(rows: torch.Tensor) -> torch.Tensor:
    """int32 [batch + 1]: where the rows of each sequence end, one behind the other."""
    return torch.nn.functional.pad(rows.sum(1).cumsum(0), (1, 0)).int()


def _packed(
    rules: Rules, sizes: Sizes, window: tuple[int, int], padding: torch.Tensor | None
) -> Spans:
    """Sequences one behind the other in each row of the batch, from numbers that rise with them."""
    if padding is not None or sizes.queries != sizes.keys or sizes.first_query:
        raise _refused("packed sequences together with padding or with a cache")
    assert rules.segments is not None
    segments = rules.segments.expand(sizes.batch, -1)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments.diff(dim=1) != 0
    begins = starts.flatten().nonzero().flatten()
    if len(begins) == sizes.batch:
        return Spans(sizes, rules, window)
    ends = torch.cat([begins, begins.new_tensor([segments.numel()])]).int()
    return Spans(sizes, rules, window, cu_seqlens_q=ends, cu_seqlens_k=ends)


def _refused(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"attn_implementation='flashcore' cannot take this attention mask: {what}; use "
        "attn_implementation='sdpa'"
    )
