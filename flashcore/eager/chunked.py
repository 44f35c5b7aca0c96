"""Batch-invariant plans with torch operators: every product in one shape, then the fold.

A library's matrix product may round differently for another number of rows, so each query token is
multiplied by itself with one whole chunk, padded where the chunk is not full: slow, and the same
bits whatever else is computed (`flashcore/reference_fold.py`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from flashcore.contract.chunks import CHUNK_TOKENS
from flashcore.contract.work import DIRECT
from flashcore.eager.run import LoadKeys, Tree, key_bounds, visible
from flashcore.problem import Rules


class Total(NamedTuple):
    """A running total: acc [..., v_head_dim], peak and total [...], fp32."""

    acc: torch.Tensor
    peak: torch.Tensor
    total: torch.Tensor

    @staticmethod
    def nothing(like: torch.Tensor) -> Total:
        """Of results of this shape."""
        peak = like.new_full(like.shape[:-1], -math.inf)
        return Total(torch.zeros_like(like), peak, torch.zeros_like(peak))

    def add(self, out: torch.Tensor, lse: torch.Tensor) -> Total:
        """With one chunk more, before all that it has. lse: -inf where no key is seen."""
        first, seen = self.peak == -math.inf, lse > -math.inf
        top = torch.maximum(self.peak, lse)
        before, added = _exponent(self.peak, top), _exponent(lse, top)
        both = self.acc * before[..., None] + out * added[..., None]
        both = torch.where(first[..., None], out, both)
        acc = torch.where(seen[..., None], both, self.acc)
        return Total(acc, top, self.total * before + added)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, lse): zeros and -inf where there is nothing."""
        safe = self.total.masked_fill(self.total == 0, 1.0)
        lse = (self.peak + safe.log()).masked_fill(self.total == 0, -math.inf)
        return self.acc / safe[..., None], lse


def attend_runs(
    q: torch.Tensor,
    positions: torch.Tensor,
    num_keys: int,
    load: LoadKeys,
    rules: Rules,
    v_dim: int,
    tree: Tree | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `run.attend_runs`, of one run, which begins with a chunk."""
    q, positions = q[0], positions[0]
    n, heads, group, _ = q.shape
    low, high = key_bounds(positions, num_keys, rules, tree)
    total = Total.nothing(q.new_empty(n, heads, group, v_dim))
    for begin in reversed(range(0, num_keys, CHUNK_TOKENS)):
        seen = visible(low, high, begin, begin + CHUNK_TOKENS, tree)
        if not bool(seen.any()):
            continue
        ((k, v),) = load(begin, min(begin + CHUNK_TOKENS, num_keys))
        keys, values = (x.new_zeros(heads, CHUNK_TOKENS, x.shape[2]).float() for x in (k, v))
        keys[:, : k.shape[1]], values[:, : v.shape[1]] = k, v
        finite = bool(torch.isfinite(values.sum()))
        outs, lses = torch.zeros_like(total.acc), torch.full_like(total.peak, -math.inf)
        for row in seen.any(1).nonzero().flatten().tolist():
            own = values if finite else torch.where(seen[row][:, None], values, 0.0)
            outs[row], lses[row] = _one_token(q[row], keys, own, seen[row], rules.softcap)
        total = total.add(outs, lses)
    out, lse = total.result()
    return out[None], lse[None]


def _one_token(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [heads, group, dim] over one chunk, of which it sees a key."""
    scores = torch.bmm(q.clone(memory_format=torch.contiguous_format), keys.transpose(1, 2))
    if softcap > 0:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores.masked_fill_(~seen, -math.inf)
    peak = scores.amax(-1, keepdim=True)
    safe = peak.masked_fill(peak == -math.inf, 0.0)
    weights = (scores - safe).exp_()
    total = weights.sum(-1, keepdim=True)
    lse = (safe + total.log())[..., 0]
    return torch.bmm(weights, values) / total, lse


def merge(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    merge_offsets: torch.Tensor,
    merge_list: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """As `merge.merge_partials`, from the last to the first."""
    offsets, entries = merge_offsets.tolist(), merge_list.tolist()
    for token in range(out.shape[0]):
        own = entries[offsets[token] : offsets[token + 1]]
        if own and own[0] != DIRECT:
            total = Total.nothing(out[token])
            for partial in reversed(own):
                total = total.add(partial_out[partial], partial_lse[partial])
            out[token], lse[token] = total.result()


def _exponent(x: torch.Tensor, peak: torch.Tensor) -> torch.Tensor:
    return (x - peak.masked_fill(peak == -math.inf, 0.0)).exp_()
