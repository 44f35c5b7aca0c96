"""Merging partial results by their log-sum-exp, in the order of the plan's merge lists."""

from __future__ import annotations

import math

import torch

from flashcore.contract.work import DIRECT


def merge_partials(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    merge_offsets: torch.Tensor,
    merge_list: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Write the merged results of all query tokens that have partial ones into out and lse.

    partial_out: [num_partial_tokens, num_q_heads, v_head_dim] fp32; partial_lse without the last
        axis.
    The sum runs over a token's list one place at a time: same inputs, same bits.
    """
    if partial_lse.shape[0] == 0:
        return
    offsets = merge_offsets.long()
    lengths = offsets.diff()
    merged = torch.zeros_like(lengths, dtype=torch.bool)
    occupied = lengths > 0
    merged[occupied] = merge_list[offsets[:-1][occupied]] != DIRECT
    tokens = torch.nonzero(merged).flatten()
    first, length = offsets[:-1][tokens], lengths[tokens]
    longest = int(length.max())

    # A column of indices for each place in the lists; past a list's end the weight is zero.
    place = torch.arange(longest, device=first.device)
    inside = place < length[:, None]
    index = merge_list[(first[:, None] + place).clamp(max=merge_list.numel() - 1)].long()
    index = torch.where(inside, index, 0)
    parts = partial_lse[index].masked_fill_(~inside[:, :, None], -math.inf)
    peak = parts.amax(1)
    weights = (parts - peak.masked_fill(peak == -math.inf, 0.0)[:, None]).exp_()
    total, acc = torch.zeros_like(peak), torch.zeros_like(out[tokens])
    for i in range(longest):
        total += weights[:, i]
        acc += weights[:, i, :, None] * partial_out[index[:, i]]
    out[tokens] = acc / total.masked_fill(total == 0, 1.0)[:, :, None]
    lse[tokens] = peak + total.log()


def apply_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> None:
    """Add each head's sink to the sum of every token's weights, in place."""
    with_sink = torch.logaddexp(lse, sinks.float())
    # A head whose sink is -inf has none; where nothing at all is visible the result stays zero.
    out *= (lse - with_sink.masked_fill(with_sink == -math.inf, 0.0)).exp_()[..., None]
    lse.copy_(with_sink)
