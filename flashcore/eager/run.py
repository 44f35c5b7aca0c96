"""Attention of query rows over KV runs, in fp32, key chunk by key chunk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from flashcore.eager.workspace import scratch
from flashcore.problem import Rules

KEYS_PER_CHUNK = 4096
"""Keys of a run taken at a time: the gathered copies stay in the cache; shorter chunks pay more in
calls."""

SCORES_PER_CHUNK = 1 << 24
"""fp32 scores alive at a time (64 MiB): bounds memory for long prefills."""

LoadKeys = Callable[[int, int], list[tuple[torch.Tensor, torch.Tensor]]]
"""(begin, end) -> for each run, K [num_kv_heads, end - begin, head_dim] and V [num_kv_heads, end -
begin, v_head_dim] of these keys, good until the next call."""


@dataclass(frozen=True)
class Tree:
    """mask: bool [n, width], of a run's queries; what a window leaves of it. first_key: [n], the
    run's key of column 0."""

    mask: torch.Tensor
    first_key: torch.Tensor


def attend_runs(
    q: torch.Tensor,
    positions: torch.Tensor,
    num_keys: int,
    load: LoadKeys,
    rules: Rules,
    v_dim: int,
    tree: Tree | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised result and LSE of queries, each over its own run of num_keys keys.

    q: [runs, n, num_kv_heads, g, head_dim] fp32, multiplied by the scale; g query heads share a KV
    head. positions: [runs, n], the key each query stands at on its run's scale; by its depth where
    a window counts from it in a tree. Several runs at once save calls, and go together only if
    every query sees all of its keys (`sees_all`).
    Returns out as q but with v_dim columns and lse without the last axis; zeros and -inf where no
    key is visible.
    """
    runs, n, heads, group, _ = q.shape
    rows = max(1, SCORES_PER_CHUNK // max(1, runs * heads * group * min(num_keys, KEYS_PER_CHUNK)))
    if n <= rows:
        return _attend_rows(q, positions, num_keys, load, rules, v_dim, tree)
    out, lse = q.new_empty(*q.shape[:-1], v_dim), q.new_empty(q.shape[:-1])
    for begin in range(0, n, rows):
        part = slice(begin, min(begin + rows, n))
        part_tree = None if tree is None else Tree(tree.mask[part], tree.first_key[part])
        out[:, part], lse[:, part] = _attend_rows(
            q[:, part], positions[:, part], num_keys, load, rules, v_dim, part_tree
        )
    return out, lse


def sees_all(first_position: int, num_keys: int, rules: Rules, tree_mask: bool) -> bool:
    """Every query sees all keys of its run; first_position is the smallest of their positions."""
    if tree_mask or rules.windowed:
        return False
    return not rules.causal or first_position >= num_keys - 1


def _attend_rows(
    q: torch.Tensor,
    positions: torch.Tensor,
    num_keys: int,
    load: LoadKeys,
    rules: Rules,
    v_dim: int,
    tree: Tree | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    runs, n, heads, group, dim = q.shape
    bounds, first, last = _bounds(positions, num_keys, rules, tree)
    seen = None
    if first >= last:
        return q.new_zeros(*q.shape[:-1], v_dim), q.new_full(q.shape[:-1], -math.inf)
    queries = q.transpose(1, 2).reshape(runs, heads, n * group, dim)
    out = lse = queries
    for begin in range(first, last, KEYS_PER_CHUNK):
        end = min(begin + KEYS_PER_CHUNK, last)
        loaded = load(begin, end)
        scores = scratch("scores", (runs, heads, n * group, end - begin), q)
        for i, (k, _) in enumerate(loaded):
            torch.bmm(queries[i], k.float().transpose(1, 2), out=scores[i])
        if rules.softcap > 0:
            scores = scores.div_(rules.softcap).tanh_().mul_(rules.softcap)
        if bounds is not None:
            seen = visible(*bounds, begin, end, tree)
            scores.view(heads, n, group, -1).masked_fill_(~seen[:, None, :], -math.inf)
        peak = scores.amax(-1, keepdim=True)
        weights = scratch("weights", tuple(scores.shape), q)
        torch.softmax(scores, -1, out=weights)
        if bounds is not None:  # rows that see nothing here: softmax makes them NaN
            weights.masked_fill_(peak == -math.inf, 0.0)
        # The largest weight is 1 / sum(exp(score - peak)).
        chunk_lse = peak - weights.amax(-1, keepdim=True).log()
        if bounds is not None:
            chunk_lse.masked_fill_(peak == -math.inf, -math.inf)
        chunk_out = queries.new_empty(*queries.shape[:-1], v_dim)
        for i, (_, v) in enumerate(loaded):
            values, apart = v.float(), None
            if seen is not None and not bool(torch.isfinite(values.sum())):
                values, apart = _finite(values)
            torch.bmm(weights[i], values, out=chunk_out[i])
            if apart is not None:
                assert seen is not None
                _add_apart(chunk_out[i].view(heads, n, group, v_dim), apart, seen)
        if begin == first:
            out, lse = chunk_out, chunk_lse
        else:
            out, lse = _merge(out, lse, chunk_out, chunk_lse)
    shape = (runs, heads, n, group)
    return out.view(*shape, v_dim).transpose(1, 2), lse.view(shape).transpose(1, 2)


def _finite(v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """v [heads, keys, dim] with zeros for what is NaN or infinite, and that with zeros for the
    rest."""
    finite = torch.isfinite(v)
    return v.where(finite, 0.0), v.where(~finite, 0.0)


def _add_apart(out: torch.Tensor, apart: torch.Tensor, seen: torch.Tensor) -> None:
    """Add what `_finite` took out to the queries that see it: times a weight above zero it is the
    same. out: [heads, n, g, dim]. seen: bool [n, keys]."""
    for key in (apart != 0).any(2).any(0).nonzero().flatten().tolist():
        out[:, seen[:, key]] += apart[:, key, None, None]


def _merge(
    out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two results over disjoint keys as one; lse keeps a last axis of one."""
    both = torch.logaddexp(lse, other_lse)
    safe = both.masked_fill(both == -math.inf, 0.0)
    return out * (lse - safe).exp_() + other * (other_lse - safe).exp_(), both


def _bounds(
    positions: torch.Tensor, num_keys: int, rules: Rules, tree: Tree | None
) -> tuple[tuple[torch.Tensor, torch.Tensor] | None, int, int]:
    """The keys each query may see, None where all see all; and the keys [first, last) to read.

    Keys that none of the queries may see are not read: they may hold anything.
    """
    least = int(positions.min()) if rules.causal else 0
    if sees_all(least, num_keys, rules, tree is not None):
        return None, 0, num_keys
    low, high = key_bounds(positions[0], num_keys, rules, tree)
    first, last = int(low.min()), int(high.max())
    if tree is None and int(low.max()) <= first and int(high.min()) >= last:
        return None, first, last
    return (low, high), first, last


def key_bounds(
    positions: torch.Tensor, num_keys: int, rules: Rules, tree: Tree | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per query the interval [low, high) of keys that causal mask and window leave; tree apart.

    In a tree it ends with the run and holds every new token: these the mask alone decides.
    """
    low = torch.zeros_like(positions)
    high = torch.full_like(positions, num_keys)
    if rules.causal and tree is None:
        high = torch.minimum(high, positions + 1)
    if rules.window_right >= 0 and tree is None:
        high = torch.minimum(high, positions + rules.window_right + 1)
    if rules.window_left >= 0:
        low = torch.maximum(low, positions - rules.window_left)
    if tree is not None:
        low = torch.minimum(low, tree.first_key.clamp(min=0))
    # An empty interval must not widen the range that the rows together read.
    low = torch.minimum(low, low.new_full((), num_keys))
    return low, torch.maximum(high, low)


def visible(
    low: torch.Tensor, high: torch.Tensor, begin: int, end: int, tree: Tree | None
) -> torch.Tensor:
    """bool [n, end - begin]: which of these keys each query sees."""
    key = torch.arange(begin, end, device=low.device)
    inside = (key >= low[:, None]) & (key < high[:, None])
    if tree is None:
        return inside
    new = key - tree.first_key[:, None]
    width = tree.mask.shape[1]
    allowed = tree.mask.gather(1, new.clamp(0, width - 1)) & (new < width)
    return inside & ((new < 0) | allowed)
