"""Dense attention: every head_dim and dtype that is shipped, and every path through the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from flashcore.cli.check.judge import TORCH_DTYPES, Finding, SelfTest, Setting, judge
from flashcore.sm90.config.dense import DTYPES, HEAD_DIMS

if TYPE_CHECKING:
    import torch

    from flashcore.problem import Packing


@dataclass(frozen=True)
class DenseCase:
    """Lengths are (queries, keys), one pair, or one for each packed sequence."""

    name: str
    lengths: tuple[tuple[int, int], ...]
    head_dim: int = 128
    heads: tuple[int, int] = (4, 4)  # query heads, kv heads
    batch: int = 2  # of cases that are not packed
    dtype: str = "bf16"
    causal: bool = False
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    sinks: bool = False
    packed: bool = False
    lse: bool = False


class Launched(NamedTuple):
    """The call's arguments, and what two calls gave."""

    case: DenseCase
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    options: dict[str, Any]
    first: tuple[torch.Tensor, ...]  # out, and the LSE where the case has it
    second: tuple[torch.Tensor, ...]
    exact: bool  # both must be the same bits, which our kernels promise


def tests() -> list[SelfTest]:
    return [SelfTest(f"dense, {case.name}", partial(launch, case), verdict) for case in cases()]


def cases() -> list[DenseCase]:
    """One case for each path through the kernel, at lengths that are no multiple of any tile."""
    square = ((1031, 1031),)
    ragged = ((130, 130), (0, 50), (1, 700), (257, 0), (333, 401))
    features = [
        DenseCase("128, LSE", ((300, 4133),), lse=True),
        DenseCase("128 causal, LSE", square, causal=True, lse=True),
        DenseCase("64, LSE", ((300, 4133),), 64, lse=True),
        DenseCase("64 causal, LSE", square, 64, causal=True, lse=True),
        DenseCase("decode, grouped heads", ((1, 1500),), heads=(8, 2), causal=True),
        DenseCase("fewer queries than keys", ((77, 900),), causal=True),
        DenseCase("more queries than keys", ((300, 120),), causal=True),
        DenseCase("one key", ((130, 1),)),
        DenseCase("many keys", ((300, 4133),)),  # full attention has tiles of its own from 4096
        DenseCase("many keys, head_dim 64", ((300, 4133),), 64),
        DenseCase("left window", square, window=(200, -1), causal=True),
        DenseCase("left window, head_dim 256", square, 256, window=(200, -1), causal=True),
        DenseCase("two-sided window", square, window=(64, 32)),
        DenseCase("soft cap", square, 256, causal=True, softcap=15.0),
        DenseCase("soft cap and window", square, 256, causal=True, window=(300, -1), softcap=15.0),
        DenseCase("sinks", square, sinks=True, causal=True, lse=True),
        DenseCase(
            "all rules", square, window=(300, -1), softcap=20.0, sinks=True, causal=True, lse=True
        ),
        # At head_dim 64 a warpgroup passes over blocks that none of its rows sees.
        DenseCase("head_dim 64, decode", ((3, 1500),), 64, heads=(8, 2), causal=True),
        DenseCase("head_dim 64, more queries", ((500, 120),), 64, causal=True),
        DenseCase("head_dim 64, left window", square, 64, window=(200, -1), causal=True),
        DenseCase("head_dim 64, one row block", ((65, 300),), 64),
        *(
            DenseCase(
                f"packed, {dim}{' causal' if causal else ''}",
                *(ragged, dim, (8, 2)),
                packed=True,
                causal=causal,
            )
            for dim in (64, 128, 256)
            for causal in (False, True)
        ),
        DenseCase(
            "packed, sinks and window",
            *(ragged, 64, (8, 2)),
            packed=True,
            causal=True,
            window=(128, -1),
            sinks=True,
        ),
        DenseCase("packed, fp16", ragged, dtype="fp16", packed=True, causal=True, heads=(8, 1)),
    ]
    plain = [
        DenseCase(
            f"{dtype} {dim}{' causal' if causal else ''}", square, dim, dtype=dtype, causal=causal
        )
        for dtype in DTYPES
        for dim in HEAD_DIMS
        for causal in (False, True)
    ]
    long = [DenseCase("fp16 64, many keys", ((300, 4133),), 64, dtype="fp16")]
    padded = [DenseCase(f"{dim}, padded", square, dim, causal=True) for dim in (40, 80, 136)]
    return [*plain, *long, *padded, *features]


def launch(case: DenseCase, setting: Setting) -> Launched:
    import torch

    import flashcore

    q, k, v, packing = _inputs(case, setting)
    options: dict[str, Any] = {
        "causal": case.causal,
        "window": case.window,
        "softcap": case.softcap,
        "sinks": torch.randn(case.heads[0], device=q.device) if case.sinks else None,
        "cu_seqlens_q": packing.cu_seqlens_q,
        "cu_seqlens_k": packing.cu_seqlens_k,
    }
    options["max_seqlen_q"] = packing.max_seqlen_q if case.packed else None

    def attend() -> tuple[torch.Tensor, ...]:
        if case.lse:
            return flashcore.attention(q, k, v, return_lse=True, impl="auto", **options)
        return (flashcore.attention(q, k, v, impl="auto", **options),)

    first, second = attend(), attend()
    del options["max_seqlen_q"]
    return Launched(case, (q, k, v), options, first, second, setting.kernels)


def verdict(launched: Launched) -> Finding:
    import torch

    from flashcore.reference import attention_reference

    case, tensors, options, first, second, exact = launched
    expected = attention_reference(*tensors, **options)
    finding = judge(first, expected[: len(first)], case.dtype)
    if exact and not finding.problem and not all(map(torch.equal, first, second)):
        return Finding("two runs differ", finding.detail)
    return finding


def _inputs(
    case: DenseCase, setting: Setting
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Packing]:
    """q, k, v and how they are packed; NaN in rows past the packed keys."""
    import torch

    from flashcore.problem import Packing

    device = setting.device
    dtype = getattr(torch, TORCH_DTYPES[case.dtype])
    generator = torch.Generator(device).manual_seed(setting.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    queries, keys = (list(lengths) for lengths in zip(*case.lengths, strict=True))
    num_heads, num_kv_heads = case.heads
    if not case.packed:
        shape_k = (case.batch, keys[0], num_kv_heads, case.head_dim)
        q = normal(case.batch, queries[0], num_heads, case.head_dim)
        return q, normal(*shape_k), normal(*shape_k), Packing()

    def bounds(lengths: list[int]) -> torch.Tensor:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return ends.to(device=device, dtype=torch.int32)

    # The CPU checks that the ends are those of the rows; a GPU's kernels must not read beyond them.
    beyond = 64 if setting.kernels else 0
    k, v = (normal(sum(keys) + beyond, num_kv_heads, case.head_dim) for _ in range(2))
    k[sum(keys) :] = v[sum(keys) :] = float("nan")
    q = normal(sum(queries), num_heads, case.head_dim)
    return q, k, v, Packing(bounds(queries), bounds(keys), max(queries))
