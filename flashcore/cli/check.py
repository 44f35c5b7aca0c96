"""`flashcore check`: run the kernels on this GPU against the reference, a line for each case."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from flashcore.cli import check_paged

if TYPE_CHECKING:
    import torch

    from flashcore.problem import Packing

Test = Callable[[], tuple[str, str]]  # what is wrong or "", and what was measured

# Frobenius norm of the error over that of the reference, in float64. Rounding P and the output to
# the dtype costs about 2e-3 in bf16 and 3e-4 in fp16; twice that is a bug.
_OUT_LIMIT = {"bf16": 5e-3, "fp16": 7e-4}
_LSE_LIMIT = 2e-4  # absolute; scores are sums of exact products in fp32


@dataclass(frozen=True)
class Case:
    """One self-test. Lengths are (queries, keys), one pair, or one for each packed sequence."""

    name: str
    lengths: tuple[tuple[int, int], ...]
    head_dim: int = 128
    heads: tuple[int, int] = (4, 4)  # query heads, kv heads
    batch: int = 2  # of cases that are not packed
    dtype: str = "bf16"
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    packed: bool = False


def cases() -> list[Case]:
    """One case for each path through the kernel, at lengths that are no multiple of any tile."""
    square = ((1031, 1031),)
    ragged = ((130, 130), (0, 50), (1, 700), (257, 0), (333, 401))
    features = [
        Case("decode, grouped heads", ((1, 1500),), heads=(8, 2), causal=True),
        Case("fewer queries than keys", ((77, 900),), causal=True),
        Case("more queries than keys", ((300, 120),), causal=True),
        Case("one key", ((130, 1),)),
        Case("many keys", ((300, 4133),)),  # full attention has tiles of its own from 4096 keys
        Case("many keys, head_dim 64", ((300, 4133),), 64),
        Case("left window", square, window=(200, -1), causal=True),
        Case("two-sided window", square, window=(64, 32)),
        Case("soft cap", square, softcap=15.0),
        Case("sinks", square, sinks=True, causal=True),
        Case("all rules", square, window=(300, -1), softcap=20.0, sinks=True, causal=True),
        # At head_dim 64 a warpgroup passes over blocks that none of its rows sees.
        Case("head_dim 64, decode", ((3, 1500),), 64, heads=(8, 2), causal=True),
        Case("head_dim 64, more queries", ((500, 120),), 64, causal=True),
        Case("head_dim 64, left window", square, 64, window=(200, -1), causal=True),
        Case("head_dim 64, one row block", ((65, 300),), 64),
        Case("head_dim 64, packed", ragged, 64, packed=True, heads=(8, 2)),
        Case("head_dim 64, packed causal", ragged, 64, packed=True, causal=True, heads=(8, 2)),
        Case("packed", ragged, packed=True),
        Case("packed, causal, grouped", ragged, packed=True, causal=True, heads=(8, 1)),
    ]
    plain = [
        Case(f"head_dim {dim}{' causal' if causal else ''}", square, dim, causal=causal)
        for dim in (64, 96, 128, 192, 256)
        for causal in (False, True)
    ]
    half = [
        Case("fp16", square, dtype="fp16", causal=True),
        Case("fp16 head_dim 64", square, 64, dtype="fp16"),
        Case("fp16 head_dim 64, many keys", ((300, 4133),), 64, dtype="fp16"),
        Case("fp16 head_dim 256", square, 256, dtype="fp16"),
    ]
    padded = [Case(f"head_dim {dim}, padded", square, dim, causal=True) for dim in (40, 80, 136)]
    return [*plain, *half, *padded, *features]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `flashcore check` to its parser."""
    parser.description = (
        "Run the kernels on this machine's Hopper GPU and compare them with the float64 "
        "reference. Exit status 0: all right; 1: a case failed; 2: no Hopper GPU to test."
    )
    parser.add_argument("--device", default="cuda", help="which GPU (default: cuda)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has TEXT")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")


def run(args: argparse.Namespace) -> int:
    """Carry the command out."""
    tests: dict[str, Test] = {
        case.name: partial(_run_case, case, args.seed, args.device) for case in cases()
    }
    tests |= {
        case.name: partial(_run_paged, case, args.seed, args.device) for case in check_paged.cases()
    }
    tests["CUDA graph"] = partial(_run_graph, args.device)
    tests["torch.compile"] = partial(_run_compiled, args.device)
    chosen = {name: test for name, test in tests.items() if args.only in name}
    if not chosen:
        print(f"flashcore check: no case has {args.only!r} in its name", file=sys.stderr)
        return 2
    try:
        import torch

        from flashcore.sm90.available import available

        usable, reason = available(args.device)
    except Exception as error:  # torch has several for a device that it does not know or have
        usable, reason = False, _first_line(error)
    if not usable:
        print(f"flashcore check: no Hopper GPU to test: {reason}", file=sys.stderr)
        return 2
    print(reason)
    with torch.cuda.device(torch.device(args.device)):
        failed = sum(not _report(name, test) for name, test in chosen.items())
    print(f"{len(chosen) - failed} passed, {failed} failed")
    return 1 if failed else 0


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _report(name: str, test: Test) -> bool:
    try:
        problem, detail = test()
    except Exception as error:  # a case that cannot run is a failed case, and the rest still runs
        problem, detail = f"{type(error).__name__}: {_first_line(error)}", ""
    verdict = "FAILED" if problem else "ok"
    print(f"{verdict:<7}{name:<28}{detail}{'  ' + problem if problem else ''}", flush=True)
    return not problem


def _run_case(case: Case, seed: int, device: str) -> tuple[str, str]:
    """(what is wrong or "", the measured errors)."""
    import torch

    from flashcore.problem import Rules
    from flashcore.reference import attention_reference
    from flashcore.sm90.launch.dense import dense_attention

    q, k, v, packing = _inputs(case, seed, device)
    sinks = torch.randn(case.heads[0], device=q.device) if case.sinks else None
    scale = case.head_dim**-0.5
    window = None if case.window == (-1, -1) else case.window
    expected, expected_lse = attention_reference(
        q,
        k,
        v,
        causal=case.causal,
        scale=scale,
        window=window,
        softcap=case.softcap,
        sinks=sinks,
        cu_seqlens_q=packing.cu_seqlens_q,
        cu_seqlens_k=packing.cu_seqlens_k,
    )
    rules = Rules.of(scale, case.causal, case.window, case.softcap)
    first, second = (
        dense_attention(q, k, v, rules, sinks, packing, return_lse=True) for _ in range(2)
    )
    out, lse = first
    assert lse is not None
    again, lse_again = second
    assert lse_again is not None
    problem, detail = _judge(out, lse, expected, expected_lse, _OUT_LIMIT[case.dtype])
    if not problem and not (torch.equal(out, again) and torch.equal(lse, lse_again)):
        problem = "two runs differ"
    return problem, detail


def _run_paged(case: check_paged.PagedCase, seed: int, device: str) -> tuple[str, str]:
    out, lse, expected, expected_lse, same = check_paged.run(case, seed, device)
    problem, detail = _judge(out, lse, expected, expected_lse, _OUT_LIMIT["bf16"])
    return problem or ("" if same else "two runs differ"), detail


def _judge(
    out: torch.Tensor,
    lse: torch.Tensor,
    expected: torch.Tensor,
    expected_lse: torch.Tensor,
    limit: float,
) -> tuple[str, str]:
    error = float((out.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    finite = expected_lse.isfinite()
    lse_error = float((lse.double() - expected_lse)[finite].abs().max()) if finite.any() else 0.0
    detail = f"error {error:.1e} (limit {limit:.0e})  lse {lse_error:.1e} (limit {_LSE_LIMIT:.0e})"
    if not error <= limit:  # also where it is not a number
        return "the output is wrong", detail
    if not (lse.isfinite() == finite).all() or not lse_error <= _LSE_LIMIT:
        return "the LSE is wrong", detail
    return "", detail


def _inputs(
    case: Case, seed: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Packing]:
    """q, k, v and how they are packed; NaN in rows past the packed keys."""
    import torch

    from flashcore.problem import Packing

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[case.dtype]
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    queries, keys = (list(lengths) for lengths in zip(*case.lengths, strict=True))
    num_heads, num_kv_heads = case.heads
    if not case.packed:
        shape_k = (case.batch, keys[0], num_kv_heads, case.head_dim)
        q = normal(case.batch, queries[0], num_heads, case.head_dim)
        return q, normal(*shape_k), normal(*shape_k), Packing(max_seqlen_q=queries[0])

    def bounds(lengths: list[int]) -> torch.Tensor:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return ends.to(device=device, dtype=torch.int32)

    k, v = (normal(sum(keys) + 64, num_kv_heads, case.head_dim) for _ in range(2))
    k[sum(keys) :] = v[sum(keys) :] = float("nan")
    q = normal(sum(queries), num_heads, case.head_dim)
    return q, k, v, Packing(bounds(queries), bounds(keys), max(queries))


def _run_graph(device: str) -> tuple[str, str]:
    """Capture a launch in a CUDA graph and replay it on new inputs."""
    import torch

    from flashcore.problem import Rules
    from flashcore.sm90.launch.dense import dense_attention

    q, k, v, _ = _inputs(Case("graph", ((700, 700),), causal=True), 0, device)

    def attend() -> torch.Tensor:
        return dense_attention(q, k, v, Rules(0.1, causal=True))[0]

    attend()  # compile and load before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    q.normal_()
    for _ in range(3):
        graph.replay()
    same = torch.equal(captured, attend())
    return ("" if same else "a replay differs from a call"), "captured once, replayed 3 times"


def _run_compiled(device: str) -> tuple[str, str]:
    """The public function inside torch.compile, in one graph, against a plain call."""
    import torch

    import flashcore

    q, k, v, _ = _inputs(Case("compiled", ((300, 300),)), 0, device)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flashcore.attention(q * 2, k, v, causal=True, impl="auto") + 1

    # Tracing is what can fail here; Inductor would only add a compiler that may not be installed.
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    same = torch.equal(compiled(q, k, v), attend(q, k, v))
    return ("" if same else "it differs from a plain call"), "one graph"
