"""Results that must be the same bits: replayed, compiled, in other company, on another GPU."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from flashcore.cli.check import dense, paged, steps
from flashcore.cli.check.judge import Finding, SelfTest, Setting
from flashcore.cli.check.paged import Batch, PagedCase

if TYPE_CHECKING:
    import torch


def tests() -> list[SelfTest]:
    return [
        *(
            SelfTest(
                f"batch invariance{suffix}",
                partial(launch_company, planner),
                judge_company,
                needs_kernels=True,
            )
            for planner, suffix in (("host", ""), ("device", ", planned on the GPU"))
        ),
        SelfTest("prefill equals decode", launch_prefilled, judge_same, needs_kernels=True),
        SelfTest("attention in a graph", launch_dense_graph, judge_same, needs_kernels=True),
        SelfTest("torch.compile", launch_compiled, judge_same),
        SelfTest("a second GPU", launch_second, judge_same, needs_kernels=True, least_gpus=2),
    ]


def launch_dense_graph(setting: Setting) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a replay on new inputs gave, and what a call gives."""
    case = dense.DenseCase("graph", ((700, 700),), causal=True)
    import flashcore

    q, k, v = dense.launch(case, setting).tensors

    def attend() -> torch.Tensor:
        return flashcore.attention(q, k, v, causal=True, impl="auto")

    graph, captured = steps.captured(attend)
    q.normal_()
    for _ in range(3):
        graph.replay()
    return [(captured, attend())]


def judge_same(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Finding:
    import torch

    same = all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
    return Finding("" if same else "the results differ", "the same bits" if same else "")


def launch_compiled(setting: Setting) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The public function inside torch.compile, in one graph, and a plain call."""
    import torch

    import flashcore

    q, k, v = dense.launch(dense.DenseCase("compiled", ((300, 300),)), setting).tensors

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return flashcore.attention(q * 2, k, v, causal=True, impl="auto") + 1

    # Tracing is what can fail here; Inductor would only add a compiler that may not be installed.
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    return [(compiled(q, k, v), attend(q, k, v))]


class Company(NamedTuple):
    """Results of each sequence: alone, and in the batch."""

    alone: list[tuple[torch.Tensor, torch.Tensor]]
    together: tuple[torch.Tensor, torch.Tensor]
    q_lens: list[int]


def launch_company(planner: str, setting: Setting) -> Company:
    """Alone by the host's plan, together by that or by a DevicePlanner's."""
    import torch

    case = PagedCase("", ((1, 2600), (1, 1037), (4, 2100), (1, 3100), (1, 1)))
    batch = paged.batch_of(case, setting)
    q_lens = batch.q_lens.tolist()
    alone = []
    for row, q in enumerate(torch.split(batch.q, q_lens)):
        one = Batch(q, batch.k, batch.v, *(t[row : row + 1] for t in batch[3:]))
        alone.append(paged.attend(one, paged.host_plan(case, one, batch_invariant=True), {}))
    if planner == "host":
        plan = paged.host_plan(case, batch, batch_invariant=True)
    else:
        made = paged.planner_for(case, batch, batch_invariant=True)
        plan = made.update(batch.table, batch.kv_lens, batch.q_lens)
    return Company(alone, paged.attend(batch, plan, {}), q_lens)


def judge_company(run: Company) -> Finding:
    import torch

    out, lse = (torch.split(result, run.q_lens) for result in run.together)
    for row, (alone, alone_lse) in enumerate(run.alone):
        if not (torch.equal(out[row], alone) and torch.equal(lse[row], alone_lse)):
            return Finding(f"sequence {row} has other bits in company")
    return Finding("", "the same bits alone and in company")


def launch_prefilled(setting: Setting) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens of a sequence of several chunks, decoded, verified and prefilled by parts, and what
    they were when it was prefilled at once."""
    import torch

    case = PagedCase("", ((2500, 2500), (1, 2100)))
    batch = paged.batch_of(case, setting)
    whole = Batch(batch.q[:2500], batch.k, batch.v, *(t[:1] for t in batch[3:]))
    expected = paged.attend(whole, paged.host_plan(case, whole, batch_invariant=True), {})
    pairs = []
    for begin, n in ((0, 1), (1023, 1), (1024, 1), (2499, 1), (1020, 7), (2040, 60), (900, 1300)):
        lengths = (torch.full_like(whole.kv_lens, length) for length in (begin + n, n))
        part = Batch(whole.q[begin : begin + n], whole.k, whole.v, whole.table, *lengths)
        found = paged.attend(part, paged.host_plan(case, part, batch_invariant=True), {})
        pairs += [(x, y[begin : begin + n]) for x, y in zip(found, expected, strict=True)]
    return pairs


def launch_second(setting: Setting) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same batch on two GPUs, the first of them current all the time."""
    import torch

    here = torch.device(setting.device)
    index = torch.cuda.current_device() if here.index is None else here.index
    there = f"cuda:{(index + 1) % torch.cuda.device_count()}"
    pairs = []
    for case in (steps.DECODE, PagedCase("prefill", paged.CHUNKED, tile_m=128)):
        batch = paged.batch_of(case, setting)
        other = Batch(*(tensor.to(there) for tensor in batch))
        results = [
            (paged.attend(b, paged.device_plan(case, b), {}), paged.attend(b, plan, {}))
            for b in (batch, other)
            for plan in [paged.host_plan(case, b)]
        ]
        torch.cuda.synchronize(there)
        pairs += [
            (a, b)
            for first, second in zip(*results, strict=True)
            for a, b in zip(first, second, strict=True)
        ]
    return pairs
