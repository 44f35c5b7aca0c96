"""Paged cases of `flashcore check`: decode and prefill on a shared prefix, planned by kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_HEADS, _KV_HEADS = 8, 2
_PREFIX = 1024  # tokens that all sequences share
_LENGTHS = ((1, 1500), (1, 1024 + 13), (9, 2100), (70, 1301), (1, 1))  # (queries, keys)
_POOL = 1 << 14  # tokens, several times what is used


@dataclass(frozen=True)
class PagedCase:
    """One self-test of paged attention in bf16."""

    head_dim: int
    v_head_dim: int
    page_tokens: int

    @property
    def name(self) -> str:
        dims = f"{self.head_dim}"
        if self.v_head_dim != self.head_dim:
            dims += f"/{self.v_head_dim}"
        return f"paged {dims}, pages of {self.page_tokens}"


def cases() -> list[PagedCase]:
    """One for each tile width and padding, by TMA boxes and by gathered rows."""
    whole = [PagedCase(dim, dim, 64) for dim in (64, 128, 256)]
    padded = ((80, 80), (96, 96), (112, 112), (192, 128))
    return [*whole, *(PagedCase(*dims, page) for dims in padded for page in (64, 1))]


def run(
    case: PagedCase, seed: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool]:
    """(out, lse, what they should be, whether a second run gives the same bits)."""
    import torch

    from flashcore import layout_from_page_table
    from flashcore.reference import paged_attention_reference

    q, k, v, table = _inputs(case, seed, device)
    q_lens, kv_lens = (
        torch.tensor(lengths, dtype=torch.int32, device=device)
        for lengths in zip(*_LENGTHS, strict=True)
    )
    layout = layout_from_page_table(table, kv_lens, page_tokens=case.page_tokens)
    expected = paged_attention_reference(q, k, v, layout, [n for n, _ in _LENGTHS])
    out, lse = attend(case, q, k, v, table, kv_lens, q_lens)
    again = attend(case, q, k, v, table, kv_lens, q_lens)
    return out, lse, *expected, torch.equal(out, again[0]) and torch.equal(lse, again[1])


def attend(
    case: PagedCase,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    table: torch.Tensor,
    kv_lens: torch.Tensor,
    q_lens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plan and attention by kernels, as an engine calls them."""
    import flashcore

    planner = flashcore.DevicePlanner(
        flashcore.Capacities(len(_LENGTHS), table.numel(), len(q)),
        num_pages=k.shape[0],
        num_q_heads=_HEADS,
        num_kv_heads=_KV_HEADS,
        head_dim=case.head_dim,
        v_head_dim=case.v_head_dim,
        page_tokens=case.page_tokens,
        device=q.device,
    )
    plan = planner.update(table, kv_lens, q_lens)
    plan.partial_out.fill_(float("nan"))
    return flashcore.paged_attention(q, k, v, plan, return_lse=True, impl="auto")


def _inputs(
    case: PagedCase, seed: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, pools with NaN in every row that no sequence has, and the page table."""
    import torch

    tokens, pages = case.page_tokens, _POOL // case.page_tokens
    generator = torch.Generator(device).manual_seed(seed)
    columns = -(-max(keys for _, keys in _LENGTHS) // tokens)
    shared = _PREFIX // tokens
    ids = torch.randperm(pages, generator=generator, device=device).int()
    table = ids[: len(_LENGTHS) * columns].view(len(_LENGTHS), columns).clone()
    table[:, :shared] = table[0, :shared]
    held = torch.zeros(pages, tokens, dtype=torch.bool, device=device)
    for row, (_, keys) in enumerate(_LENGTHS):
        slots = torch.arange(keys, device=device)
        held[table[row, slots // tokens].long(), slots % tokens] = True

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    q = normal(sum(queries for queries, _ in _LENGTHS), _HEADS, case.head_dim)
    k, v = (normal(pages, tokens, _KV_HEADS, d) for d in (case.head_dim, case.v_head_dim))
    k[~held] = v[~held] = float("nan")
    return q, k, v, table
