"""The dense benchmark: problems x providers, timed in turn, with the error of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from flashcore.bench.machine import read_clocks
from flashcore.bench.problems import DenseProblem
from flashcore.bench.providers import Provider
from flashcore.bench.report import Row, summarise
from flashcore.bench.timing import (
    Contestant,
    Timing,
    cuda_elapsed_ms,
    host_us_per_call,
    time_interleaved,
)

if TYPE_CHECKING:
    import torch

_ERROR_ROWS = 256  # queries of one head whose output is compared with float64


def run_dense(
    problems: Sequence[DenseProblem],
    providers: Sequence[Provider],
    *,
    rounds: int,
    sample_ms: float,
    device: str = "cuda",
    elapsed_ms: Callable[[Contestant, int], float] = cuda_elapsed_ms,
    on_problem: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """`rows`, `skipped`, `clocks` and `summary` of the benchmark's JSON object."""
    rows: list[Row] = []
    skipped: list[str] = []
    clocks = []
    for number, problem in enumerate(problems):
        on_problem(problem.name)
        q, k, v = _inputs(problem, number, device)
        ready = _prepare(problem, providers, (q, k, v), skipped)
        timings = time_interleaved(
            [contestant for _, contestant, _ in ready],
            rounds=rounds,
            sample_ms=sample_ms,
            elapsed_ms=elapsed_ms,
        )
        if device == "cuda":
            clocks.append({"after": problem.name, **read_clocks()})
        for provider, contestant, errors in ready:
            rows.append(_row(problem, provider, timings[contestant.name], errors))
    return {"rows": rows, "skipped": skipped, "clocks": clocks, "summary": summarise(rows)}


def host_overhead_us(provider: Provider) -> float:
    """Host time of one launch, on a problem so small that the GPU is never behind."""
    problem = DenseProblem(1, 1, 1, 128, 128, False, "bf16")
    call = provider.prepare(problem, *_inputs(problem, 0, "cuda"))
    with provider.context():
        host_us_per_call(call, 20)
        return min(host_us_per_call(call) for _ in range(5))


def _inputs(problem: DenseProblem, seed: int, device: str) -> tuple[torch.Tensor, ...]:
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[problem.dtype]
    generator = torch.Generator(device).manual_seed(seed)
    heads = (problem.heads, problem.kv_heads, problem.kv_heads)
    # Normal values: zeros or constants would draw less power and so run at higher clocks.
    return tuple(
        torch.randn(
            (problem.batch, problem.seqlen, number, problem.head_dim),
            generator=generator,
            device=device,
            dtype=dtype,
        )
        for number in heads
    )


def _prepare(
    problem: DenseProblem,
    providers: Sequence[Provider],
    inputs: tuple[torch.Tensor, ...],
    skipped: list[str],
) -> list[tuple[Provider, Contestant, dict[str, float]]]:
    """The providers that run `problem`, each with the error of its output."""
    picked, expected = _expected(problem, *inputs)
    ready = []
    for provider in providers:
        try:
            call = provider.prepare(problem, *inputs)
            with provider.context():
                out = call()
            got = out[0, picked, 0].double()
        except Exception as error:  # a peer that cannot run a problem leaves a note, not a gap
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            skipped.append(f"{provider.name} on {problem.name}: {reason}")
            continue
        difference = got - expected
        errors = {
            "relative_error": float(difference.norm() / expected.norm()),
            "max_abs_error": float(difference.abs().max()),
        }
        ready.append((provider, Contestant(provider.name, call, provider.context), errors))
    return ready


def _expected(
    problem: DenseProblem, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(query positions spread over the sequence, their float64 output) of the first head."""
    import torch

    count = min(_ERROR_ROWS, problem.seqlen)
    picked = torch.linspace(0, problem.seqlen - 1, count, device=q.device).long()
    scores = q[0, picked, 0].double() @ k[0, :, 0].double().T * problem.head_dim**-0.5
    if problem.causal:
        keys = torch.arange(problem.seqlen, device=q.device)
        scores.masked_fill_(keys[None, :] > picked[:, None], float("-inf"))
    return picked, scores.softmax(1) @ v[0, :, 0].double()


def _row(
    problem: DenseProblem, provider: Provider, timing: Timing, errors: dict[str, float]
) -> Row:
    return {
        **asdict(problem),
        "kernel": provider.kernel,
        "provider": provider.name,
        "version": provider.version,
        "ms": timing.median_ms,
        "ms_p10": timing.p10_ms,
        "ms_p90": timing.p90_ms,
        "tflops": problem.flops / timing.median_ms / 1e9,
        "rounds": timing.rounds,
        "calls_per_round": timing.calls_per_round,
        **errors,
    }
