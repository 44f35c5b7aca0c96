"""Online softmax in base 2 on accumulator fragments."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, const_expr

LN2 = 0.6931471805599453
LOG2_E = 1.4426950408889634
# Independent chains of a row's reduction: one chain of tile_n/4 dependent FMNMX or FADD would
# leave the pipe idle between issues.
CHAINS = 4


class Scale(NamedTuple):
    """Factors of a score: to log2 units, and before tanh when there is a soft cap."""

    log2: Float32
    cap_factor: Float32


@cute.jit
def scale_of(config: cutlass.Constexpr, softmax_scale: Float32, softcap: Float32) -> Scale:
    """config: a DenseConfig or a PagedConfig."""
    if const_expr(config.softcap):
        scale = Scale(softcap * LOG2_E, softmax_scale / softcap)
    else:
        scale = Scale(softmax_scale * LOG2_E, Float32(0.0))
    return scale


@cute.jit
def quad_max(x: Float32):
    """Maximum over the four neighbouring lanes that hold one row."""
    x = cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, 1))
    return cute.arch.fmax(x, cute.arch.shuffle_sync_bfly(x, 2))


@cute.jit
def quad_sum(x: Float32):
    """Sum over the four neighbouring lanes that hold one row."""
    x = x + cute.arch.shuffle_sync_bfly(x, 1)
    return x + cute.arch.shuffle_sync_bfly(x, 2)


@cute.jit
def soft_cap(scores: cute.Tensor, factor: Float32):
    """S <- tanh(S * factor), as 1 - 2 / (e^2x + 1): tanh.approx is off by 5e-4 before the cap."""
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(scores, mode=[1])):
            e = cute.math.exp2(scores[r, c] * (factor * (2.0 * LOG2_E)), fastmath=True)
            scores[r, c] = 1.0 - 2.0 * cute.arch.rcp_approx(e + 1.0)


@cute.jit
def online_softmax(
    scores: cute.Tensor,  # (rows, columns): S in, P out
    row_max: cute.Tensor,
    row_sum: cute.Tensor,  # of this thread's columns; the quad is summed once, at the end
    alpha: cute.Tensor,  # out: factor for what was accumulated before
    scale_log2: Float32,
    first: cutlass.Constexpr[bool],
    rescale_log2: cutlass.Constexpr[float],
):
    """One block of keys. Returns whether any row of the warp needs O rescaled by alpha.

    row_max may lag behind the true maximum by rescale_log2 (in log2 units of P): P is then at
    most 2^rescale_log2, exact in both 16-bit formats up to rounding, and O stays as it is.
    """
    moved = Boolean(False)
    columns = const_expr(cute.size(scores, mode=[1]))
    for r in cutlass.range_constexpr(cute.size(scores, mode=[0])):
        chains = [scores[r, c] for c in range(CHAINS)]
        for c in cutlass.range_constexpr(CHAINS, columns):
            chains[c % CHAINS] = cute.arch.fmax(chains[c % CHAINS], scores[r, c])
        peak = quad_max(
            cute.arch.fmax(
                cute.arch.fmax(chains[0], chains[1]), cute.arch.fmax(chains[2], chains[3])
            )
        )
        if const_expr(not first):
            old = row_max[r]
            # -inf - -inf is NaN, which compares false: such a row stays at -inf.
            lags = (peak - old) * scale_log2 > rescale_log2
            moved = moved or lags
            peak = peak if lags else old
        row_max[r] = peak
        finite = Float32(0.0) if peak == -Float32.inf else peak
        base = finite * scale_log2
        if const_expr(not first):
            alpha[r] = cute.math.exp2((old - finite) * scale_log2, fastmath=True)
        sums = [Float32(0.0) for _ in range(CHAINS)]
        for c in cutlass.range_constexpr(columns):
            p = cute.math.exp2(scores[r, c] * scale_log2 - base, fastmath=True)
            scores[r, c] = p
            sums[c % CHAINS] = p if c < CHAINS else sums[c % CHAINS] + p
        total = (sums[0] + sums[1]) + (sums[2] + sums[3])
        row_sum[r] = total if const_expr(first) else row_sum[r] * alpha[r] + total
    return cute.arch.vote_any_sync(moved)


@cute.jit
def rescale(out: cute.Tensor, alpha: cute.Tensor):
    """O <- alpha O, by rows."""
    for r in cutlass.range_constexpr(cute.size(out, mode=[0])):
        for c in cutlass.range_constexpr(cute.size(out, mode=[1])):
            out[r, c] = out[r, c] * alpha[r]


@cute.jit
def finalize(
    peak: Float32,
    total: Float32,
    scale_log2: Float32,
    sink: Float32,
    has_sink: cutlass.Constexpr[bool],
):
    """(factor for O, natural-log LSE) of one row; (0, -inf) where no key is visible.

    A sink is one more key with a logit of its own and a zero value.
    """
    peak_log2 = peak * scale_log2
    if const_expr(has_sink):
        sink_log2 = sink * LOG2_E
        top = cute.arch.fmax(peak_log2, sink_log2)
        top = Float32(0.0) if top == -Float32.inf else top
        shrink = cute.math.exp2(peak_log2 - top, fastmath=True)
        total = total * shrink + cute.math.exp2(sink_log2 - top, fastmath=True)
        peak_log2 = top
    empty = total == 0.0
    factor = Float32(0.0) if empty else cute.arch.rcp_approx(total)
    lse = (peak_log2 + cute.math.log2(total, fastmath=True)) * LN2
    lse = -Float32.inf if empty else lse
    if const_expr(has_sink):
        factor = factor * shrink
    return factor, lse
