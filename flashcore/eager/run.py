"""Attention of a block of query rows over one KV run, in fp32, key chunk by key chunk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

KEYS_PER_CHUNK = 4096
"""Keys taken at a time: the gathered copies stay in the cache; shorter chunks pay more in calls."""

SCORES_PER_CHUNK = 1 << 24
"""fp32 scores alive at a time (64 MiB): bounds memory for long prefills."""

LoadKeys = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""(begin, end) -> K and V of these keys, [num_kv_heads, end - begin, head_dim], good until the next
call."""


@dataclass(frozen=True)
class Rules:
    """What of a score depends on the call and not on the run. Window bounds of -1 do not bind."""

    scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float


@dataclass(frozen=True)
class Tree:
    """mask: bool [n, width], of a run's queries. first_key: [n], the run's key of column 0."""

    mask: torch.Tensor
    first_key: torch.Tensor


def attend_run(
    q: torch.Tensor,
    positions: torch.Tensor,
    num_keys: int,
    load: LoadKeys,
    rules: Rules,
    tree: Tree | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Normalised result and LSE of queries over one run of keys, written into out and lse.

    q: [num_kv_heads, n, g, head_dim] fp32, multiplied by the scale; g query heads share a KV head.
    positions: [n], the key each query stands at on the run's scale. out: [n, num_kv_heads * g,
    head_dim] and lse: [n, num_kv_heads * g], fp32; zeros and -inf where no key is visible.
    """
    heads, n, group, _ = q.shape
    keys = min(num_keys, KEYS_PER_CHUNK)
    rows = max(1, SCORES_PER_CHUNK // max(1, heads * group * keys))
    for begin in range(0, n, rows):
        part = slice(begin, min(begin + rows, n))
        rows_tree = None if tree is None else Tree(tree.mask[part], tree.first_key[part])
        _attend_rows(
            q[:, part], positions[part], num_keys, load, rules, rows_tree, out[part], lse[part]
        )


def _attend_rows(
    q: torch.Tensor,
    positions: torch.Tensor,
    num_keys: int,
    load: LoadKeys,
    rules: Rules,
    tree: Tree | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    heads, n, group, dim = q.shape
    bounds, first, last = _bounds(positions, num_keys, rules, tree)
    if first >= last:
        out.zero_()
        lse.fill_(-math.inf)
        return
    queries = q.reshape(heads, n * group, dim)
    peak: torch.Tensor | None = None
    total = acc = queries
    for begin in range(first, last, KEYS_PER_CHUNK):
        end = min(begin + KEYS_PER_CHUNK, last)
        k, v = load(begin, end)
        scores = torch.matmul(queries, k.float().transpose(1, 2))
        if rules.softcap > 0:
            scores = scores.div_(rules.softcap).tanh_().mul_(rules.softcap)
        if bounds is not None:
            hidden = ~visible(*bounds, begin, end, tree)
            scores.view(heads, n, group, -1).masked_fill_(hidden[:, None, :], -math.inf)
        new_peak = scores.amax(-1, keepdim=True)
        if peak is not None:
            new_peak = torch.maximum(new_peak, peak)
        # A row that has seen nothing yet has the peak -inf; 0 keeps its weights exp(-inf) = 0.
        safe = new_peak if bounds is None else new_peak.masked_fill(new_peak == -math.inf, 0.0)
        weights = scores.sub_(safe).exp_()
        chunk_total, chunk_acc = weights.sum(-1, keepdim=True), torch.matmul(weights, v.float())
        if peak is None:
            total, acc = chunk_total, chunk_acc
        else:
            old = (peak - safe).exp_()
            total, acc = total * old + chunk_total, acc * old + chunk_acc
        peak = new_peak
    assert peak is not None
    acc = acc / (total if bounds is None else total.masked_fill(total == 0, 1.0))
    out.view(n, heads, group, dim).copy_(acc.view(heads, n, group, dim).transpose(0, 1))
    logs = peak + total.log()
    lse.view(n, heads, group).copy_(logs.view(heads, n, group).transpose(0, 1))


def _bounds(
    positions: torch.Tensor, num_keys: int, rules: Rules, tree: Tree | None
) -> tuple[tuple[torch.Tensor, torch.Tensor] | None, int, int]:
    """The keys each query may see, None where all see all; and the keys [first, last) to read.

    Keys that none of the queries may see are not read: they may hold anything.
    """
    unbounded = tree is None and rules.window_left < 0 and rules.window_right < 0
    if unbounded and (not rules.causal or int(positions.min()) >= num_keys - 1):
        return None, 0, num_keys
    low, high = key_bounds(positions, num_keys, rules, tree)
    first, last = int(low.min()), int(high.max())
    if tree is None and int(low.max()) <= first and int(high.min()) >= last:
        return None, first, last
    return (low, high), first, last


def key_bounds(
    positions: torch.Tensor, num_keys: int, rules: Rules, tree: Tree | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per query the interval [low, high) of keys that causal mask and window leave; tree apart."""
    low = torch.zeros_like(positions)
    high = torch.full_like(positions, num_keys)
    if rules.causal and tree is None:
        high = torch.minimum(high, positions + 1)
    if rules.window_right >= 0:
        high = torch.minimum(high, positions + rules.window_right + 1)
    if rules.window_left >= 0:
        low = torch.maximum(low, positions - rules.window_left)
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
