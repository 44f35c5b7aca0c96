"""Our paged attention and its peers behind one interface. Every peer is optional.

`PagedProvider.prepare` is outside the timing: it plans, allocates workspaces and tells a cascade
its levels. What it returns is captured in a CUDA graph and does one layer's attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from flashcore.bench.paged_problems import DTYPE, Level, PagedInputs, PagedProblem
from flashcore.bench.providers import UnsupportedError, load_flash_ops, version_of

if TYPE_CHECKING:
    from flashcore.planner.types import Plan

Call = Callable[[], torch.Tensor]  # out [total_q, q_heads, head_dim]

OURS = "flashcore"
OURS_BF16 = "flashcore_bf16"
"""On the same values in pages of 16 bits, beside fp8 pages."""
WAYS = {"flashcore_converting": False, "flashcore_expanding": True}
"""Both ways of prefill over fp8 pages, of which the plan of `OURS` chooses."""
WRONG = 1e-2
"""Four times what rounding P and the output to bf16 costs, less than a single page left out of
131072 tokens."""
WRONG_IN_FP8 = 0.2
"""Of kernels that round q and P to fp8: three times what that costs."""
_WORKSPACE_BYTES = 512 << 20  # FlashInfer's, for its partial results


@dataclass(frozen=True)
class PagedProvider:
    """One implementation; `name` is unique and says the kernel."""

    name: str
    version: str
    prepare: Callable[[PagedProblem, PagedInputs], Call]
    wrong: float = WRONG  # relative error of a query token's output from which it counts as wrong


def paged_providers(
    xqa: bool = False, fp8: bool = False
) -> tuple[list[PagedProvider], dict[str, str]]:
    """(providers that can be imported, name of each other -> why not). xqa: with FlashInfer's
    kernel of that name, which is compiled for every shape at its first use. fp8: those that take
    pages of fp8, XQA among them."""
    makers: dict[str, Callable[[], PagedProvider]] = {
        OURS: _flashcore,
        OURS_BF16: lambda: replace(_flashcore(), name=OURS_BF16, prepare=_prepare_widened),
        **{name: partial(_one_way, name) for name in WAYS},
        "fa3": _fa3_fp8,
        "flashinfer": lambda: _flashinfer("flashinfer", "fa2"),
        "flashinfer_xqa": lambda: replace(_flashinfer_xqa(), wrong=WRONG_IN_FP8),
    }
    makers = makers if fp8 else _of_16_bits(xqa)
    found, missing = [], {}
    for name, make in makers.items():
        try:
            found.append(make())
        except Exception as error:  # peers fail to import in many ways
            missing[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return found, missing


def _of_16_bits(xqa: bool) -> dict[str, Callable[[], PagedProvider]]:
    makers: dict[str, Callable[[], PagedProvider]] = {
        OURS: _flashcore,
        "fa3": _fa3,
        "fa4": _fa4,
        "flashinfer": lambda: _flashinfer("flashinfer", "fa2"),
        "flashinfer_fa3": lambda: _flashinfer("flashinfer_fa3", "fa3"),
        "cascade_fa2": lambda: _cascade("cascade_fa2", "fa2"),
        "cascade_fa3": lambda: _cascade("cascade_fa3", "fa3"),
    }
    if xqa:
        makers["flashinfer_xqa"] = _flashinfer_xqa
    return makers


def plan_of(
    problem: PagedProblem,
    inputs: PagedInputs,
    *,
    share: bool = True,
    batch_invariant: bool = False,
    expand: bool | None = None,
) -> Plan:
    """Our plan of a batch, as `flashcore.plan` makes it by default."""
    import flashcore

    layout = flashcore.layout_from_page_table(
        inputs.page_table, inputs.seq_lens, page_tokens=problem.page_tokens
    )
    return flashcore.plan(
        layout,
        q_lens=[problem.q_len] * problem.sequences,
        num_q_heads=problem.q_heads,
        num_kv_heads=problem.kv_heads,
        head_dim=problem.head_dim,
        page_tokens=problem.page_tokens,
        itemsize=problem.kv_dtype.itemsize,
        share=share,
        batch_invariant=batch_invariant,
        expand=expand,
    )


def our_call(inputs: PagedInputs, plan: Plan) -> Call:
    """Attention and merge over a plan made before."""
    import flashcore

    pool, scale = (inputs.k_pages, inputs.v_pages), None
    if inputs.k_pages.itemsize == 1:  # as engines have it; left out, a graph makes its own
        scale = torch.ones((), device=inputs.device)
    return lambda: flashcore.paged_attention(
        inputs.q, *pool, plan, k_scale=scale, v_scale=scale, impl="auto"
    )


def _flashcore() -> PagedProvider:
    from flashcore import __version__
    from flashcore.sm90.available import available

    usable, reason = available("cuda")
    if not usable:
        raise UnsupportedError(reason)
    return PagedProvider(OURS, __version__, lambda p, x: our_call(x, plan_of(p, x)))


def _prepare_widened(problem: PagedProblem, inputs: PagedInputs) -> Call:
    wide = inputs.widened()
    return our_call(wide, plan_of(replace(problem, kv_dtype=DTYPE), wide))


def _one_way(name: str) -> PagedProvider:
    def prepare(problem: PagedProblem, inputs: PagedInputs) -> Call:
        if problem.q_len == 1:
            raise UnsupportedError("it is timed in prefill")
        return our_call(inputs, plan_of(problem, inputs, expand=WAYS[name]))

    return replace(_flashcore(), name=name, prepare=prepare)


def _fa3_fp8() -> PagedProvider:
    """With q in fp8 as well, which it wants; the cast of q is not timed."""
    of_16_bits = _fa3()

    def prepare(problem: PagedProblem, inputs: PagedInputs) -> Call:
        if problem.kv_dtype is not torch.float8_e4m3fn:
            raise UnsupportedError("of fp8 it takes e4m3 alone")
        return of_16_bits.prepare(problem, replace(inputs, q=inputs.q.to(problem.kv_dtype)))

    return replace(of_16_bits, prepare=prepare, wrong=WRONG_IN_FP8)


def _fa3() -> PagedProvider:
    attend, number = load_fa3()

    def prepare(problem: PagedProblem, inputs: PagedInputs) -> Call:
        # Queries of one length: [sequences, q_len, heads, dim] spares it the offsets.
        q = inputs.q.view(problem.sequences, problem.q_len, problem.q_heads, problem.head_dim)

        def call() -> torch.Tensor:
            pool = (inputs.k_pages, inputs.v_pages)
            return _rows(attend(q, *pool, inputs.page_table, inputs.seq_lens), problem)

        return call

    return PagedProvider("fa3", number, prepare)


def load_fa3() -> tuple[Callable[..., torch.Tensor], str]:
    """What `sgl_kernel.flash_attn.flash_attn_with_kvcache` calls, with its defaults; its version.

    The function takes q, k_pages, v_pages, page_table, seq_lens, and for packed q [total_q, heads,
    dim] also cu_seqlens_q and max_seqlen_q.
    """
    forward, number = load_flash_ops()
    options = {
        "is_rotary_interleaved": True,
        "scheduler_metadata": None,
        "num_splits": 0,  # its heuristic
        "pack_gqa": None,
        "sm_margin": 0,
        "sinks": None,
        "sparse_mask_fine": None,
        "only_qv": False,
    }

    def attend(
        q: torch.Tensor,
        k_pages: torch.Tensor,
        v_pages: torch.Tensor,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        cu_seqlens_q: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
    ) -> torch.Tensor:
        # New k and v, q_v, out | offsets of k, of new k, seqused_q | longest k | batch index, left
        # pad, rotary cos, sin, lengths, three scales | scale, causal, window, chunk, softcap.
        arguments = (
            *([None] * 4),
            *(cu_seqlens_q, None, None, None, seq_lens, max_seqlen_q, None),
            *(page_table, *([None] * 8)),
            *(q.shape[-1] ** -0.5, True, -1, -1, 0, 0.0),
        )
        out: torch.Tensor = forward(q, k_pages, v_pages, *arguments, **options)[0]
        return out

    return attend, number


def _fa4() -> PagedProvider:
    attend = import_module("flash_attn.cute").flash_attn_varlen_func

    def prepare(problem: PagedProblem, inputs: PagedInputs) -> Call:
        offsets = torch.arange(problem.sequences + 1, dtype=torch.int32, device=inputs.device)
        offsets = offsets * problem.q_len

        def call() -> torch.Tensor:
            out = attend(
                inputs.q,
                inputs.k_pages,
                inputs.v_pages,
                cu_seqlens_q=offsets,
                seqused_k=inputs.seq_lens,
                max_seqlen_q=problem.q_len,
                max_seqlen_k=problem.tokens,
                page_table=inputs.page_table,
                causal=True,
                num_splits=1,  # its Hopper kernel cannot split
            )
            return _rows(out[0] if isinstance(out, tuple) else out, problem)

        return call

    return PagedProvider("fa4", version_of("flash-attn-4", "fa4", "flash-attn"), prepare)


def _flashinfer(name: str, backend: str) -> PagedProvider:
    """Every sequence for itself: the tensor-core decode for one query, else the paged prefill."""
    flashinfer = import_module("flashinfer")

    def prepare(problem: PagedProblem, inputs: PagedInputs) -> Call:
        own = _own_level(problem, inputs)
        pages, pool = own.pages.to(inputs.device), (inputs.k_pages, inputs.v_pages)
        heads = (problem.q_heads, problem.kv_heads, problem.head_dim)
        dtypes = {"q_data_type": DTYPE, "kv_data_type": problem.kv_dtype}
        if problem.q_len == 1:
            if backend != "fa2":
                raise UnsupportedError("its tensor-core decode is the fa2 kernel")
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                _workspace(inputs), "NHD", use_tensor_cores=True
            )
            wrapper.plan(
                *(own.page_offsets, pages, own.last_page_tokens),
                *(*heads, problem.page_tokens),
                **dtypes,
            )
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                _workspace(inputs), "NHD", backend=backend
            )
            wrapper.plan(
                *(own.q_offsets, own.page_offsets, pages, own.last_page_tokens),
                *(*heads, problem.page_tokens),
                causal=True,
                **dtypes,
            )
        return lambda: wrapper.run(inputs.q, pool)

    return PagedProvider(name, str(flashinfer.__version__), prepare)


def _flashinfer_xqa() -> PagedProvider:
    """Its decode for few query heads a KV head, every sequence for itself."""
    flashinfer = import_module("flashinfer")
    attend = import_module("flashinfer.decode").xqa_batch_decode_with_kv_cache

    def prepare(problem: PagedProblem, inputs: PagedInputs) -> Call:
        if problem.q_len > 1:
            raise UnsupportedError("it is timed in decode")
        workspace = _workspace(inputs).zero_()  # as it wants it
        pool, lens = (inputs.k_pages, inputs.v_pages), inputs.seq_lens.to(torch.uint32)
        scale = problem.head_dim**-0.5

        def call() -> torch.Tensor:
            out = attend(
                *(inputs.q, pool, workspace, inputs.page_table, lens, problem.tokens),
                bmm1_scale=scale,
                kv_layout="NHD",
            )
            return _rows(out, problem)

        return call

    return PagedProvider("flashinfer_xqa", str(flashinfer.__version__), prepare)


def _cascade(name: str, backend: str) -> PagedProvider:
    """FlashInfer's cascade, told the true levels; its wrappers choose fa3 on Hopper by themselves,
    which is the slower one in most batches."""
    flashinfer = import_module("flashinfer")

    def prepare(problem: PagedProblem, inputs: PagedInputs) -> Call:
        levels = inputs.batch.levels
        if not levels:
            raise UnsupportedError("nothing is shared, so there are no levels")
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(
            len(levels), _workspace(inputs), "NHD"
        )
        for inner in wrapper._batch_prefill_wrappers:
            inner._backend = backend
        wrapper.plan(
            [level.q_offsets for level in levels],
            [level.page_offsets for level in levels],
            [level.pages.to(inputs.device) for level in levels],
            [level.last_page_tokens for level in levels],
            *(problem.q_heads, problem.kv_heads, problem.head_dim, problem.page_tokens),
            causal=problem.q_len > 1,
            q_data_type=DTYPE,
            kv_data_type=DTYPE,
        )
        pool = (inputs.k_pages, inputs.v_pages)
        return lambda: wrapper.run(inputs.q, pool)

    return PagedProvider(name, str(flashinfer.__version__), prepare)


def _own_level(problem: PagedProblem, inputs: PagedInputs) -> Level:
    """All pages of each sequence, as FlashInfer takes them."""
    table, lens = inputs.batch.page_table, inputs.batch.seq_lens
    counts = (lens + problem.page_tokens - 1) // problem.page_tokens
    used = torch.arange(table.shape[1])[None] < counts[:, None]
    offsets = torch.zeros(problem.sequences + 1, dtype=torch.int32)
    offsets[1:] = counts.cumsum(0)
    return Level(
        torch.arange(problem.sequences + 1, dtype=torch.int32) * problem.q_len,
        offsets,
        table[used],
        lens - (counts - 1) * problem.page_tokens,
    )


def _workspace(inputs: PagedInputs) -> torch.Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=inputs.device)


def _rows(out: Any, problem: PagedProblem) -> torch.Tensor:
    rows: torch.Tensor = out.view(problem.total_q, problem.q_heads, problem.head_dim)
    return rows
