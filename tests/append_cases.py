"""Tokens for `append_kv`: hostile values, pools of any strides, slots that are left out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product

import torch

from flashcore.append import scatter_by_torch
from flashcore.problem import KVPool

PAGE_DTYPES = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
FP8 = PAGE_DTYPES[2:]
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, -0.0, 448.0, -449.0, 464.0, 465.0, 57344.0, 6.5e4)
# Ties of e4m3 and of e5m2, their subnormals and below these.
TIES = (17.0, 18.0, 19.0, 1.125, 1.375, 2**-9, 2**-10, 3 * 2**-10, 2**-16, 2**-17, 1e-7)


@dataclass(frozen=True)
class Case:
    """kind: of the pools' strides (`pool`). scale: as `tests.fp8.scales` has them."""

    dtype: torch.dtype
    pages: torch.dtype
    page_tokens: int = 16
    heads: int = 2
    dim: int = 64
    v_dim: int = 64
    tokens: int = 7
    kind: str = "plain"
    scale: str = "none"
    slots: torch.dtype = torch.int64


def cases() -> list[Case]:
    """Every pair of dtypes with every scale; every page size, width and kind of stride once each
    with fp8 and with 16 bits."""
    found = [
        Case(dtype, pages, scale=scale)
        for dtype, pages in product((torch.bfloat16, torch.float16, torch.float32), PAGE_DTYPES)
        for scale in (("none", "one", "heads", "mixed") if pages in FP8 else ("none",))
    ]
    for pages in (torch.bfloat16, torch.float8_e4m3fn):
        common = (torch.bfloat16, pages)
        found += [Case(*common, page_tokens=n, tokens=n + 3) for n in (1, 2, 4, 8, 32, 64, 128)]
        found += [Case(*common, dim=d, v_dim=d, heads=8) for d in (80, 96, 128, 192, 256)]
        found += [Case(*common, dim=192, v_dim=128, heads=h) for h in (1, 3, 4, 16)]
        found += [Case(*common, kind=kind) for kind in ("heads first", "one row", "odd", "tokens")]
        found += [
            Case(*common, slots=torch.int32),
            Case(*common, tokens=0),
            Case(*common, tokens=1),
        ]
        found += [Case(*common, tokens=300, heads=8, dim=128, v_dim=128)]
    return found


def values(case: Case, device: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v, of a fused projection's output where kind is "tokens"; each special value is in
    some head."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for dim in (case.dim, case.v_dim):
        x = torch.randn(case.tokens, case.heads, dim, generator=g) * 40
        flat = x.flatten()
        special = torch.tensor(SPECIAL + TIES)[: flat.numel()]
        flat[torch.randperm(flat.numel(), generator=g)[: len(special)]] = special
        made.append(x.to(case.dtype).to(device))
    if case.kind == "tokens":
        both = torch.cat([x.flatten(1) for x in made], 1)
        k, v = both.split([case.heads * case.dim, case.heads * case.v_dim], 1)
        return k.unflatten(1, (case.heads, -1)), v.unflatten(1, (case.heads, -1))
    return made[0], made[1]


def pool(case: Case, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages that hold bytes of their own, so that a write too many is seen."""
    num_pages = 4 + 2 * case.tokens // case.page_tokens
    dims = (case.dim, case.v_dim)
    size = case.pages.itemsize
    shape = (num_pages, case.page_tokens, case.heads)
    if case.kind == "heads first":
        shape = (num_pages, case.heads, case.page_tokens)
    extra = 3 if case.kind == "odd" else 0
    if case.kind == "one row":
        memory = _bytes((*shape, sum(dims) * size), device).view(case.pages)
        k, v = memory.split(dims, -1)
    else:
        k, v = (
            _bytes((*shape, (dim + extra) * size), device).view(case.pages)[..., extra:]
            for dim in dims
        )
    return (k.transpose(1, 2), v.transpose(1, 2)) if case.kind == "heads first" else (k, v)


def _bytes(shape: tuple[int, ...], device: str) -> torch.Tensor:
    return (torch.arange(math.prod(shape)) % 113).to(torch.uint8).view(shape).to(device)


def slots_of(case: Case, num_slots: int, device: str, seed: int = 0) -> torch.Tensor:
    """Distinct ones, a third of them left out; every other element of a tensor."""
    g = torch.Generator().manual_seed(seed)
    slots = torch.randperm(num_slots, generator=g)[: case.tokens]
    left_out = torch.rand(case.tokens, generator=g) < 0.33
    slots[left_out] = -torch.randint(1, 9, (int(left_out.sum()),), generator=g)
    wide = torch.full((2 * case.tokens,), 10**9)
    wide[::2] = slots
    return wide.to(case.slots).to(device)[::2]


def scales_of(case: Case, device: str) -> dict[str, torch.Tensor]:
    """Keyword arguments."""
    each = torch.rand(2 * case.heads, generator=torch.Generator().manual_seed(1)) + 0.1
    found = {
        "none": {},
        "one": {"k_scale": torch.tensor(0.37), "v_scale": torch.tensor(3e-3)},
        "heads": {"k_scale": each[: case.heads], "v_scale": each[::2] * 7},
        "mixed": {"v_scale": torch.tensor(0.11).expand(case.heads)},
    }[case.scale]
    return {name: scale.to(device) for name, scale in found.items()}


def expected(
    k: torch.Tensor,
    v: torch.Tensor,
    pages: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
    scales: dict[str, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages as torch operators leave them, on the CPU."""
    copies = KVPool(*(x.cpu().clone() for x in pages), **{n: s.cpu() for n, s in scales.items()})
    if len(k):
        scatter_by_torch(k.cpu(), v.cpu(), copies, slots.cpu())
    return copies.k, copies.v


def differences(actual: torch.Tensor, wanted: torch.Tensor) -> list[list[int]]:
    """Where two tensors of pages are not the same to the bit; one NaN is as good as another."""
    a, b = actual.cpu(), wanted
    same = (a.float() == b.float()) & (a.float().signbit() == b.float().signbit())
    return (~(same | (a.float().isnan() & b.float().isnan()))).nonzero().tolist()
