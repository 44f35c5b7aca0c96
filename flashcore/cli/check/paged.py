"""Paged attention: decode and verify on a shared prefix, chunked prefill, pages of every kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from flashcore import triton_compiler
from flashcore.cli.check.judge import TORCH_DTYPES, Finding, SelfTest, Setting, judge
from flashcore.sm90.config.paged import PagedCall, PagedConfig, choose
from flashcore.sm90.families import PAGED
from flashcore.sm90.shipped import shipped_kernels

if TYPE_CHECKING:
    import torch

PREFIX = 1024  # tokens that all sequences share
FP8_DTYPES = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}
_POOL = 1 << 14  # tokens, several times what is used
Lengths = tuple[tuple[int, int], ...]  # (new tokens, tokens with them) of each sequence

DECODE: Lengths = ((1, 1500), (1, 1037), (1, 2100), (1, 1301), (1, 1))
VERIFY: Lengths = ((8, 1500), (8, 1040), (5, 2100), (8, 1301), (3, 3))
CHUNKED: Lengths = ((300, 1324), (200, 1500), (130, 1154), (257, 2100), (33, 33))
MIXED: Lengths = ((1, 1500), (1, 1037), (9, 2100), (70, 1301), (1, 1))


@dataclass(frozen=True)
class PagedCase:
    """One batch. host: planned by `flashcore.plan`, else by a DevicePlanner."""

    name: str
    lengths: Lengths
    head_dim: int = 128
    v_head_dim: int = 0  # 0: head_dim
    page_tokens: int = 64
    heads: tuple[int, int] = (8, 2)
    dtype: str = "bf16"
    tile_m: int = 64
    tree: bool = False
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    sinks: bool = False
    host: bool = False
    kv_dtype: str = ""  # "e4m3" or "e5m2": of the pages, with scales; "": dtype
    expand: bool = False  # these, before attention, by a plan of the host

    @property
    def value_dim(self) -> int:
        return self.v_head_dim or self.head_dim


class Batch(NamedTuple):
    """Tensors of a case; every row of the pools that no sequence has is NaN."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    kv_lens: torch.Tensor
    q_lens: torch.Tensor


class Launched(NamedTuple):
    """The call's arguments, and what two calls gave."""

    case: PagedCase
    batch: Batch
    options: dict[str, Any]
    first: tuple[torch.Tensor, torch.Tensor]
    second: tuple[torch.Tensor, torch.Tensor]
    exact: bool  # both must be the same bits, which our kernels promise


def tests() -> list[SelfTest]:
    shipped = _shipped()
    return [SelfTest(f"paged, {c.name}", partial(launch, c), verdict) for c in cases(shipped)]


def cases(shipped: set[PagedConfig] | None = None) -> list[PagedCase]:
    """What engines do, then every width, dtype and kind of page that is shipped, with tokens of
    several kinds. Planned on the GPU as far as such kernels are shipped, else by the host."""
    shipped = _shipped() if shipped is None else shipped
    engines = [
        PagedCase("decode on a shared prefix", DECODE),
        PagedCase("decode, the host's plan", DECODE, host=True),
        PagedCase("decode, pages of 1", DECODE, page_tokens=1),
        PagedCase("decode, pages of 8", DECODE, page_tokens=8),
        PagedCase("verify with a tree", VERIFY, tree=True),
        PagedCase("verify with a tree, the host's plan", VERIFY, tree=True, host=True),
        PagedCase("chunked prefill", CHUNKED, tile_m=128),
        PagedCase("chunked prefill, pages of 1", CHUNKED, page_tokens=1, tile_m=128),
        PagedCase("decode on fp8 pages", DECODE, kv_dtype="e4m3"),
        PagedCase("chunked prefill on fp8 pages", CHUNKED, tile_m=128, kv_dtype="e4m3"),
        *_expanding(),
        PagedCase("one KV head for each query head", DECODE, heads=(4, 4)),
        PagedCase("sinks and window", MIXED, 64, heads=(16, 2), window=(127, 0), sinks=True),
        PagedCase("soft cap and window", MIXED, 256, heads=(4, 2), window=(600, 0), softcap=30.0),
    ]
    plain = [c for c in shipped if c == _config(PagedCase("", (), **_width(c)), c.device_counts)]
    widths = [
        PagedCase(f"{c.kv_dtype or c.dtype} {dims}, pages of {c.page_tokens}", MIXED, **_width(c))
        for c in sorted(plain, key=lambda c: (c.kv_dtype, c.dtype, c.head_dim, -c.page_tokens))
        for dims in [f"{c.head_dim}/{c.v_head_dim}" if c.v_head_dim < c.head_dim else c.head_dim]
    ]
    return [
        replace(case, host=case.host or _config(case, True) not in shipped)
        for case in dict.fromkeys([*engines, *widths])
    ]


def _expanding() -> list[PagedCase]:
    """Where its kernel can be compiled."""
    if triton_compiler.missing() is not None:
        return []
    return [
        PagedCase(
            *("chunked prefill on expanded fp8 pages", CHUNKED),
            tile_m=128,
            kv_dtype="e4m3",
            host=True,
            expand=True,
        )
    ]


def _shipped() -> set[PagedConfig]:
    return {kernel.config for kernel in shipped_kernels() if kernel.family is PAGED}


def _width(config: PagedConfig) -> dict[str, Any]:
    names = ("head_dim", "v_head_dim", "page_tokens", "dtype", "kv_dtype")
    return {name: getattr(config, name) for name in names}


def _config(case: PagedCase, device_counts: bool) -> PagedConfig:
    """Of the kernel that the case is for, planned on the GPU or by the host."""
    call = PagedCall(
        case.dtype,
        case.head_dim,
        case.page_tokens,
        case.heads[0] // case.heads[1],
        case.value_dim,
        window=case.window is not None,
        softcap=case.softcap > 0,
        sinks=case.sinks,
        tree=case.tree,
        device_counts=device_counts,
        kv_dtype="" if case.expand else case.kv_dtype,
        expanded=case.expand,
    )
    return choose(call, case.tile_m)


def launch(case: PagedCase, setting: Setting) -> Launched:
    batch = batch_of(case, setting)
    options = options_of(case, batch)
    on_host = case.host or not setting.kernels
    first, second = (
        attend(batch, host_plan(case, batch) if on_host else device_plan(case, batch), options)
        for _ in range(2)
    )
    return Launched(case, batch, options, first, second, setting.kernels)


def verdict(launched: Launched) -> Finding:
    import torch

    case, batch, options, first, second, exact = launched
    finding = judge(first, expected(case, batch, options), case.dtype)
    if exact and not finding.problem and not all(map(torch.equal, first, second)):
        return Finding("two runs differ", finding.detail)
    return finding


def attend(batch: Batch, plan: Any, options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    import flashcore

    return flashcore.paged_attention(
        batch.q, batch.k, batch.v, plan, return_lse=True, impl="auto", **options
    )


def expected(
    case: PagedCase, batch: Batch, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the reference, in float64."""
    from flashcore import layout_from_page_table
    from flashcore.reference import paged_attention_reference

    layout = layout_from_page_table(batch.table, batch.kv_lens, page_tokens=case.page_tokens)
    return paged_attention_reference(
        *(batch.q, batch.k, batch.v), layout, batch.q_lens.tolist(), **options
    )


def host_plan(case: PagedCase, batch: Batch, **choices: Any) -> Any:
    import flashcore

    layout = flashcore.layout_from_page_table(
        batch.table, batch.kv_lens, page_tokens=case.page_tokens
    )
    return flashcore.plan(
        layout,
        q_lens=batch.q_lens,
        num_q_heads=case.heads[0],
        num_kv_heads=case.heads[1],
        head_dim=case.head_dim,
        v_head_dim=case.value_dim,
        dtype=batch.k.dtype,
        tile_m=case.tile_m,
        expand=case.expand or None,
        **choices,
    )


def planner_for(case: PagedCase, batch: Batch, **choices: Any) -> Any:
    """With room for that many sequences, pages and query tokens."""
    import flashcore

    return flashcore.DevicePlanner(
        flashcore.Capacities(len(batch.kv_lens), batch.table.numel(), len(batch.q)),
        num_pages=batch.k.shape[0],
        num_q_heads=case.heads[0],
        num_kv_heads=case.heads[1],
        head_dim=case.head_dim,
        v_head_dim=case.value_dim,
        page_tokens=case.page_tokens,
        dtype=batch.k.dtype,
        tile_m=case.tile_m,
        device=batch.q.device,
        **choices,
    )


def device_plan(case: PagedCase, batch: Batch) -> Any:
    """Made by kernels, as an engine does it; partial results that nobody writes are NaN."""
    plan = planner_for(case, batch).update(batch.table, batch.kv_lens, batch.q_lens)
    plan.partial_out.fill_(float("nan"))
    return plan


def options_of(case: PagedCase, batch: Batch) -> dict[str, Any]:
    """Masks and features of a call."""
    import torch

    options: dict[str, Any] = {"window": case.window, "softcap": case.softcap}
    if case.sinks:
        options["sinks"] = torch.linspace(-1, 1, case.heads[0], device=batch.q.device)
    if case.kv_dtype:  # neither a power of two nor the same for all heads
        options["k_scale"] = torch.linspace(0.6, 1.1, case.heads[1], device=batch.q.device)
        options["v_scale"] = torch.tensor(0.3, device=batch.q.device)
    if case.tree:
        masks = [_tree(queries) for queries, _ in case.lengths]
        width = max(queries for queries, _ in case.lengths)
        rows = [torch.nn.functional.pad(mask, (0, width - len(mask))) for mask in masks]
        options["tree_mask"] = torch.cat(rows).to(batch.q.device)
    return options


def _tree(tokens: int) -> torch.Tensor:
    """A draft tree in which token t follows token (t - 1) // 2: it sees its ancestors, itself."""
    import torch

    mask = torch.eye(tokens, dtype=torch.bool)
    for t in range(1, tokens):
        mask[t] |= mask[(t - 1) // 2]
    return mask


def batch_of(case: PagedCase, setting: Setting) -> Batch:
    import torch

    device, tokens = setting.device, case.page_tokens
    pages = _POOL // tokens
    generator = torch.Generator(device).manual_seed(setting.seed)
    sequences = len(case.lengths)
    columns = -(-max(keys for _, keys in case.lengths) // tokens)
    shared = PREFIX // tokens
    ids = torch.randperm(pages, generator=generator, device=device).int()
    table = ids[: sequences * columns].view(sequences, columns).clone()
    table[:, :shared] = table[0, :shared]
    held = torch.zeros(pages, tokens, dtype=torch.bool, device=device)
    for row, (_, length) in enumerate(case.lengths):
        slots = torch.arange(length, device=device)
        held[table[row, slots // tokens].long(), slots % tokens] = True
    dtype = getattr(torch, TORCH_DTYPES[case.dtype])

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    queries, keys = zip(*case.lengths, strict=True)
    q = normal(sum(queries), case.heads[0], case.head_dim)
    k, v = (normal(pages, tokens, case.heads[1], d) for d in (case.head_dim, case.value_dim))
    k[~held] = v[~held] = float("nan")
    if case.kv_dtype:
        k, v = (pool.to(getattr(torch, FP8_DTYPES[case.kv_dtype])) for pool in (k, v))
    kv_lens, q_lens = (
        torch.tensor(lengths, dtype=torch.int32, device=device) for lengths in (keys, queries)
    )
    return Batch(q, k, v, table, kv_lens, q_lens)
