"""Attention of a block of query rows over one KV run, in fp32, key chunk by key chunk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

KEYS_PER_CHUNK = 8192
"""Bounds the gathered copy of K and V; short chunks pay more in calls than they win in cache."""

SCORES_PER_CHUNK = 1 << 24
"""fp32 scores alive at a time (64 MiB): bounds memory for long prefills."""

LoadKeys = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""(begin, end) -> K and V of these keys, [num_kv_heads, end - begin, head_dim]."""


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
    tree: Tree | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised result and LSE of queries over one run of keys.

    q: [num_kv_heads, n, g, head_dim]; g query heads share a KV head. positions: [n], the key each
    query stands at on the run's scale. Returns out [n, num_kv_heads * g, head_dim] fp32 and
    lse [n, num_kv_heads * g] fp32, zeros and -inf where no key is visible.
    """
    heads, n, group, dim = q.shape
    out = torch.zeros(n, heads * group, dim, dtype=torch.float32, device=q.device)
    lse = torch.full((n, heads * group), -math.inf, dtype=torch.float32, device=q.device)
    keys = min(num_keys, KEYS_PER_CHUNK)
    rows = max(1, SCORES_PER_CHUNK // max(1, heads * group * keys))
    for begin in range(0, n, rows):
        part = slice(begin, min(begin + rows, n))
        rows_tree = None if tree is None else Tree(tree.mask[part], tree.first_key[part])
        _attend_rows(
            q[:, part], positions[part], num_keys, load, rules, rows_tree, out[part], lse[part]
        )
    return out, lse


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
    low, high = key_bounds(positions, num_keys, rules, tree)
    # Keys that none of these rows may see are not read: they may hold anything.
    first, last = int(low.min()), int(high.max())
    if first >= last:
        return
    unmasked = tree is None and int(low.max()) <= first and int(high.min()) >= last
    scaled = (q.float() * rules.scale).reshape(heads, n * group, dim)
    peak: torch.Tensor | None = None
    total = torch.zeros((), device=q.device)
    acc = total
    for begin in range(first, last, KEYS_PER_CHUNK):
        end = min(begin + KEYS_PER_CHUNK, last)
        k, v = load(begin, end)
        scores = torch.matmul(scaled, k.float().transpose(1, 2))
        if rules.softcap > 0:
            scores = scores.div_(rules.softcap).tanh_().mul_(rules.softcap)
        if not unmasked:
            hidden = ~visible(low, high, begin, end, tree)
            scores.view(heads, n, group, -1).masked_fill_(hidden[:, None, :], -math.inf)
        new_peak = scores.amax(-1, keepdim=True)
        if peak is not None:
            new_peak = torch.maximum(new_peak, peak)
        # A row that has seen nothing yet has the peak -inf; 0 keeps its weights exp(-inf) = 0.
        safe = new_peak if unmasked else new_peak.masked_fill(new_peak == -math.inf, 0.0)
        weights = scores.sub_(safe).exp_()
        chunk_total, chunk_acc = weights.sum(-1, keepdim=True), torch.matmul(weights, v.float())
        if peak is None:
            total, acc = chunk_total, chunk_acc
        else:
            old = (peak - safe).exp_()
            total, acc = total * old + chunk_total, acc * old + chunk_acc
        peak = new_peak
    assert peak is not None
    acc = acc / (total if unmasked else total.masked_fill(total == 0, 1.0))
    out.copy_(acc.view(heads, n, group, dim).transpose(0, 1).reshape(out.shape))
    lse.copy_((peak + total.log()).view(heads, n, group).transpose(0, 1).reshape(lse.shape))


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
