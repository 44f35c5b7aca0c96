"""What an engine's step relies on: plans in captured graphs, told faults, appended tokens."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from flashcore.cli.check import paged
from flashcore.cli.check.judge import Finding, SelfTest, Setting, judge, worst
from flashcore.cli.check.paged import Batch, PagedCase

if TYPE_CHECKING:
    import torch

DECODE = PagedCase("decode", paged.DECODE)
FP8 = PagedCase("decode", paged.DECODE, kv_dtype="e4m3")
# Other tables and lengths in the same buffers: another batch, one with idle rows, one alone.
_REPLAYS: tuple[paged.Lengths, ...] = (
    paged.DECODE,
    ((1, 1200), (0, 0), (1, 1600), (0, 0), (1, 77)),
    ((1, 2100), (0, 0), (0, 0), (0, 0), (0, 0)),
    ((1, 1025), (1, 1026), (1, 1027), (1, 1028), (1, 1029)),
)


def tests() -> list[SelfTest]:
    return [
        *(
            SelfTest(
                f"planner in a graph, pages of {page}",
                partial(launch_graph, page),
                judge_graph,
                needs_kernels=True,
            )
            for page in (64, 1)
        ),
        SelfTest("plan from a device layout", launch_pager, paged.verdict, needs_kernels=True),
        SelfTest("faults are told", launch_faults, judge_faults, needs_kernels=True),
        SelfTest("wrong page tables are refused", launch_refusals, judge_refusals),
        SelfTest("append_kv, then decode", partial(launch_append, DECODE), paged.verdict),
        SelfTest("append_kv to fp8 pages, then decode", partial(launch_append, FP8), paged.verdict),
    ]


# ---------------------------------------------------------------- graphs


class Replayed(NamedTuple):
    case: PagedCase
    batch: Batch
    found: tuple[torch.Tensor, torch.Tensor]


def launch_graph(page_tokens: int, setting: Setting) -> list[Replayed]:
    """One captured update and attention, replayed with each batch of _REPLAYS in its buffers."""
    import torch

    # Of the widths whose kernels are shipped for plans made on the GPU.
    width = 128 if page_tokens > 8 else 96
    cases = [PagedCase("", lengths, width, page_tokens=page_tokens) for lengths in _REPLAYS]
    batches = [
        paged.batch_of(case, setting._replace(seed=setting.seed + i))
        for i, case in enumerate(cases)
    ]
    columns = max(batch.table.shape[1] for batch in batches)
    tables = [torch.nn.functional.pad(b.table, (0, columns - b.table.shape[1])) for b in batches]
    first = batches[0]
    buffers = Batch(*(tensor.clone() for tensor in first._replace(table=tables[0])))
    planner = paged.planner_for(cases[0], buffers)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        plan = planner.update(buffers.table, buffers.kv_lens, buffers.q_lens)
        return paged.attend(buffers, plan, {})

    graph, out = captured(step)
    replayed = []
    for case, batch, table in zip(cases, batches, tables, strict=True):
        buffers.q.zero_()
        buffers.q[: len(batch.q)].copy_(batch.q)
        for buffer, value in zip(buffers[1:], batch._replace(table=table)[1:], strict=True):
            buffer.copy_(value)
        graph.replay()
        replayed.append(Replayed(case, batch, (out[0].clone(), out[1].clone())))
    return replayed


def judge_graph(replayed: list[Replayed]) -> Finding:
    findings = []
    for case, batch, (out, lse) in replayed:
        rows = len(batch.q)
        findings.append(judge((out[:rows], lse[:rows]), paged.expected(case, batch, {}), "bf16"))
        if out[rows:].any():
            findings.append(Finding("rows without a sequence are not zero"))
    finding = worst(findings)
    return finding._replace(detail=f"{finding.detail}  {len(replayed)} replays")


def captured(call: Any) -> tuple[Any, Any]:
    """A graph of `call` after one call outside of it, which loads the kernels; its result."""
    import torch

    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


# ---------------------------------------------------------------- other ways to a plan


def launch_pager(setting: Setting) -> paged.Launched:
    """Layout and plan by kernels, twice."""
    import flashcore

    batch = paged.batch_of(DECODE, setting)
    pager = flashcore.DevicePager(
        max_batch=len(batch.kv_lens),
        max_entries=batch.table.numel(),
        num_pages=batch.k.shape[0],
        page_tokens=DECODE.page_tokens,
        device=batch.q.device,
    )
    planner = paged.planner_for(DECODE, batch)

    def once() -> tuple[torch.Tensor, torch.Tensor]:
        layout = pager.update_from_page_table(batch.table, batch.kv_lens)
        return paged.attend(batch, planner.update_from_layout(layout, batch.q_lens), {})

    return paged.Launched(DECODE, batch, {}, once(), once(), True)


def launch_append(case: PagedCase, setting: Setting) -> paged.Launched:
    """The new tokens' K and V are taken out of the pages and put there by `append_kv`; the
    reference reads the pages as they were."""
    import torch

    import flashcore

    batch = paged.batch_of(case, setting)
    options = paged.options_of(case, batch)
    scales = {name: value for name, value in options.items() if name.endswith("_scale")}
    last = batch.kv_lens.long() - 1
    rows = batch.table.gather(1, (last // case.page_tokens)[:, None])[:, 0].long()
    slots = last % case.page_tokens
    emptied, new = [], []
    for name, pages in (("k_scale", batch.k), ("v_scale", batch.v)):
        bits = pages.view(torch.int16 if pages.itemsize == 2 else torch.uint8)
        taken = bits[rows, slots].view(pages.dtype).float()
        new.append(taken if not scales else taken * scales[name].expand(case.heads[1])[:, None])
        left = bits.clone()
        left[rows, slots] = -1 if pages.itemsize == 2 else 0xFF  # NaN
        emptied.append(left.view(pages.dtype))
    flashcore.append_kv(
        *(*new, *emptied),
        page_table=batch.table,
        seq_lens=batch.kv_lens,
        q_lens=batch.q_lens,
        **scales,
    )
    filled = batch._replace(k=emptied[0], v=emptied[1])
    results = (paged.attend(filled, paged.host_plan(case, batch), options) for _ in range(2))
    return paged.Launched(case, batch, options, next(results), next(results), setting.kernels)


# ---------------------------------------------------------------- faults


class Faulty(NamedTuple):
    """A batch, its results when all is well, with planted faults, and when they are gone."""

    well: tuple[torch.Tensor, torch.Tensor]
    faulty: tuple[torch.Tensor, torch.Tensor]
    again: tuple[torch.Tensor, torch.Tensor]
    bad: list[int]  # Fault bits of each sequence of the faulty batch
    seen: tuple[int, int, int]  # `DevicePlanner.faults_seen` after all


def launch_faults(setting: Setting) -> Faulty:
    """A page id out of the pool in sequence 1, a length beyond the page table in sequence 3."""
    import torch

    batch = paged.batch_of(DECODE, setting)
    planner = paged.planner_for(DECODE, batch)

    def once(
        table: torch.Tensor, kv_lens: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], list[int]]:
        plan = planner.update(table, kv_lens, batch.q_lens)
        return paged.attend(batch, plan, {}), plan.bad.tolist()

    table, kv_lens = batch.table.clone(), batch.kv_lens.clone()
    table[1, 3] = batch.k.shape[0]
    kv_lens[3] = table.shape[1] * DECODE.page_tokens + 1
    well, _ = once(batch.table, batch.kv_lens)
    faulty, bad = once(table, kv_lens)
    again, _ = once(batch.table, batch.kv_lens)
    torch.cuda.synchronize()
    return Faulty(well, faulty, again, bad, planner.faults_seen())


def judge_faults(run: Faulty) -> Finding:
    import torch

    from flashcore.contract.counts import Fault

    expected = [0, Fault.PAGE, 0, Fault.LENGTH, 0]
    faults, updates, sequence = run.seen
    if run.bad != expected:
        return Finding(f"bad is {run.bad}, not {[int(fault) for fault in expected]}")
    if faults != Fault.PAGE | Fault.LENGTH or updates != 1 or sequence not in (1, 3):
        return Finding(f"the host was told {tuple(map(int, run.seen))}")
    out, well = run.faulty[0], run.well[0]
    if not out[[1, 3]].isnan().all():
        return Finding("sequences that could not be planned have results")
    # Other groups, other order of sums: near, not equal.
    rest = [0, 2, 4]
    if not torch.allclose(out[rest].float(), well[rest].float(), atol=5e-3):
        return Finding("the fault of one sequence reached another")
    if not torch.equal(run.again[0], well):
        return Finding("the fault outlived its batch")
    return Finding("", "2 planted, 2 told; the other sequences unharmed")


def launch_refusals(setting: Setting) -> list[str]:
    """What layouts say of the same two faults; "" where they take them."""
    import flashcore

    batch = paged.batch_of(DECODE, setting)
    said = []
    for fault in ("page", "length"):
        table, kv_lens = batch.table.clone(), batch.kv_lens.clone()
        if fault == "page":
            table[1, 3] = batch.k.shape[0]
        else:
            kv_lens[3] = table.shape[1] * DECODE.page_tokens + 1
        try:
            flashcore.layout_from_page_table(
                table, kv_lens, page_tokens=DECODE.page_tokens, num_pages=batch.k.shape[0]
            )
            said.append("")
        except ValueError as error:
            said.append(str(error))
    return said


def judge_refusals(said: list[str]) -> Finding:
    page, length = said
    if "page_table" not in page or "seq_lens" not in length:
        return Finding(f"a fault was taken, or its error does not name it: {said}")
    return Finding("", "each in one error that names the argument")
