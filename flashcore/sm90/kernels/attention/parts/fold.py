"""The fold of a row's chunks, from the last to the first, with one arithmetic wherever it is done.

A chunk's result is (out, lse), normalised, fp32; the running total (out, peak, total) stands for
out / total with an LSE of peak + log(total). A chunk of which the row sees no key changes no bit of
the total, and the first one that it sees is the total. Products and sums are written as the
instructions that they are: ptxas would contract them as the code around them suggests, which the
attention kernel and the merge do not share. `flashcore/reference_fold.py` is the specification.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, const_expr
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from flashcore.sm90.kernels.attention.parts.softmax import LN2, LOG2_E


@dsl_user_op
def fma(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    """a b + c, rounded once."""
    return _instruction("fma.rn.f32 $0, $1, $2, $3;", (a, b, c), loc, ip)


@dsl_user_op
def mul(a: Float32, b: Float32, *, loc=None, ip=None) -> Float32:
    """a b, rounded, whatever is done with it next."""
    return _instruction("mul.rn.f32 $0, $1, $2;", (a, b), loc, ip)


def _instruction(text: str, operands, loc, ip) -> Float32:
    values = [Float32(x).ir_value(loc=loc, ip=ip) for x in operands]
    return Float32(
        llvm.inline_asm(
            T.f32(),
            values,
            text,
            "=f" + ",f" * len(values),
            has_side_effects=False,
            is_align_stack=False,
            asm_dialect=llvm.AsmDialect.AD_ATT,
        )
    )


@cute.jit
def exponent(x: Float32, peak: Float32) -> Float32:
    """exp(x - peak), 0 where x is -inf, of which peak is a bound."""
    safe = Float32(0.0) if peak == -Float32.inf else peak
    return cute.math.exp2(mul(x - safe, Float32(LOG2_E)), fastmath=True)


@cute.jit
def close(peak: Float32, total: Float32, scale_log2: Float32):
    """(factor of the output, lse) of a chunk, from what the online softmax leaves of a row."""
    empty = total == 0.0
    factor = Float32(0.0) if empty else cute.arch.rcp_approx(total)
    log2 = fma(peak, scale_log2, cute.math.log2(total, fastmath=True))
    lse = -Float32.inf if empty else mul(log2, Float32(LN2))
    return factor, lse


@cute.jit
def factors(peak: Float32, total: Float32, lse: Float32):
    """(peak, total) with one chunk more; the factors of what was before, and of the chunk."""
    top = cute.arch.fmax(peak, lse)
    before, added = exponent(peak, top), exponent(lse, top)
    return top, fma(total, before, added), before, added


@cute.jit
def weigh(
    x: Float32, y: Float32, before: Float32, added: Float32, first: Boolean, unseen: Boolean
) -> Float32:
    """An element x of the total with y of the chunk. first: no chunk before. unseen: no key."""
    both = fma(y, added, mul(x, before))
    both = y if first else both
    return x if unseen else both


@cute.jit
def finish(peak: Float32, total: Float32, sink: Float32, has_sink: cutlass.Constexpr[bool]):
    """(factor of the output, lse) of a total, sink included; (0, -inf) where there is nothing."""
    shrink = Float32(1.0)
    if const_expr(has_sink):
        top = cute.arch.fmax(peak, sink)
        shrink = exponent(peak, top)
        total = fma(total, shrink, exponent(sink, top))
        peak = top
    empty = total == 0.0
    factor = Float32(0.0) if empty else cute.arch.rcp_approx(total)
    if const_expr(has_sink):
        factor = mul(factor, shrink)
    lse = fma(cute.math.log2(total, fastmath=True), Float32(LN2), peak)
    return factor, (-Float32.inf if empty else lse)
