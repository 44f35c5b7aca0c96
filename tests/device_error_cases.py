"""Wrong inputs that need a device: one error each, naming the argument, what came, what may come.

`here` is the device of all that is right, `elsewhere` another one. On a GPU they are "cuda" and
"cpu"; on a machine without one "cpu" and "meta" take their places, for all but what only kernels
refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

import flashcore

PAGE = 16
HEADS = {"num_q_heads": 8, "num_kv_heads": 2, "head_dim": 64}


class Places(NamedTuple):
    here: str
    elsewhere: str


def table(here: str) -> torch.Tensor:
    return torch.tensor([[0, 1, 2], [0, 1, 3]], dtype=torch.int32, device=here)


def lengths(here: str, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=here)


def layout(here: str) -> flashcore.Layout:
    return flashcore.layout_from_page_table(table(here), lengths(here, 40, 37), page_tokens=PAGE)


def planner(here: str, **other: Any) -> flashcore.DevicePlanner:
    options = {
        "capacities": flashcore.Capacities(4, 16, 8),
        "num_pages": 8,
        "page_tokens": PAGE,
        "num_workers": 8,
        "device": here,
    }
    return flashcore.DevicePlanner(**{**options, **HEADS, **other})


def pager(here: str, **other: Any) -> flashcore.DevicePager:
    options = {
        "max_batch": 4,
        "max_entries": 16,
        "max_tokens": 64,
        "num_pages": 8,
        "page_tokens": PAGE,
        "device": here,
    }
    return flashcore.DevicePager(**{**options, **other})


def host_plan(here: str) -> flashcore.Plan:
    return flashcore.plan(layout(here), q_lens=[1, 2], num_workers=8, **HEADS)


def _bf16(here: str, *shape: int) -> torch.Tensor:
    return torch.randn(shape, device=here).bfloat16()


def valid(name: str, here: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function, and arguments that it takes, made anew."""
    k = _bf16(here, 2, 7, 2, 64)
    pages = _bf16(here, 8, PAGE, 2, 64)
    ends = lengths(here, 0, 3, 5)
    arguments: dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]] = {
        "attention": lambda: (
            flashcore.attention,
            {"q": _bf16(here, 2, 5, 8, 64), "k": k, "v": k.clone(), "sinks": _bf16(here, 8)},
        ),
        "attention, packed": lambda: (
            flashcore.attention,
            {
                "q": _bf16(here, 5, 8, 64),
                **{name: _bf16(here, 5, 2, 64) for name in "kv"},
                "cu_seqlens_q": ends,
                "cu_seqlens_k": ends.clone(),
                "max_seqlen_q": 3,
            },
        ),
        "paged_attention": lambda: (
            flashcore.paged_attention,
            {
                "q": _bf16(here, 3, 8, 64),
                "k_pages": pages,
                "v_pages": pages.clone(),
                "plan": host_plan(here),
                "sinks": _bf16(here, 8),
                "tree_mask": torch.ones(3, 2, dtype=torch.bool, device=here),
                "tree_positions": lengths(here, 39, 35, 36),
                "out": _bf16(here, 3, 8, 64),
            },
        ),
        "paged_attention, planned inside": lambda: (
            flashcore.paged_attention,
            {
                "q": _bf16(here, 3, 8, 64),
                "k_pages": pages,
                "v_pages": pages.clone(),
                "page_table": table(here),
                "seq_lens": lengths(here, 40, 37),
                "cu_seqlens_q": lengths(here, 0, 1, 3),
                "out": _bf16(here, 3, 8, 64),
            },
        ),
        "paged_attention, fp8": lambda: (
            flashcore.paged_attention,
            {
                "q": _bf16(here, 3, 8, 64),
                "k_pages": pages.to(torch.float8_e4m3fn),
                "v_pages": pages.to(torch.float8_e4m3fn),
                "plan": host_plan(here),
                "k_scale": torch.ones(2, device=here),
                "v_scale": torch.ones((), device=here),
            },
        ),
        "layout_from_page_table": lambda: (
            flashcore.layout_from_page_table,
            {
                "page_table": table(here),
                "seq_lens": lengths(here, 40, 37),
                "page_tokens": PAGE,
                "page_resident_bitmap": torch.zeros(8, dtype=torch.bool, device=here),
            },
        ),
        "layout_from_csr": lambda: (
            flashcore.layout_from_csr,
            {
                "indptr": lengths(here, 0, 2, 5),
                "indices": lengths(here, 3, 0, 3, 1, 2),
                "last_page_len": lengths(here, 1, 4),
                "page_tokens": PAGE,
            },
        ),
        "build_layout": lambda: (
            flashcore.build_layout,
            {
                "token_to_page": lengths(here, 0, 0, 0, 1, 1, 2),
                "seq_starts": lengths(here, 0, 2),
                "seq_ends": lengths(here, 6, 6),
                "page_tokens": PAGE,
                "num_pages": 8,
            },
        ),
        "plan": lambda: (flashcore.plan, {"layout": layout(here), "num_workers": 8, **HEADS}),
        "append_kv": lambda: (
            flashcore.append_kv,
            {
                **{name: _bf16(here, 3, 2, 64) for name in "kv"},
                "k_pages": pages,
                "v_pages": pages.clone(),
                "page_table": table(here),
                "seq_lens": lengths(here, 40, 37),
                "q_lens": lengths(here, 1, 2),
            },
        ),
        "append_kv, by slots": lambda: (
            flashcore.append_kv,
            {
                **{name: _bf16(here, 3, 2, 64) for name in "kv"},
                "k_pages": pages,
                "v_pages": pages.clone(),
                "slot_mapping": lengths(here, 1, 2, 30),
            },
        ),
        "append_kv, fp8": lambda: (
            flashcore.append_kv,
            {
                **{name: _bf16(here, 3, 2, 64) for name in "kv"},
                "k_pages": pages.to(torch.float8_e5m2),
                "v_pages": pages.to(torch.float8_e5m2),
                "slot_mapping": lengths(here, 1, 2, 30),
                "k_scale": torch.ones(2, device=here),
                "v_scale": torch.ones((), device=here),
            },
        ),
        "DevicePlanner": lambda: (planner, {"here": here}),
        "DevicePlanner.update": lambda: (
            planner(here).update,
            {
                "page_table": table(here),
                "seq_lens": lengths(here, 40, 37),
                "q_lens": lengths(here, 1, 2),
            },
        ),
        "DevicePlanner.update, by ends": lambda: (
            planner(here).update,
            {
                "page_table": table(here),
                "seq_lens": lengths(here, 40, 37),
                "cu_seqlens_q": lengths(here, 0, 1, 3),
            },
        ),
        "DevicePlanner.update_from_layout": lambda: (
            planner(here).update_from_layout,
            {"layout": pager(here).layout, "q_lens": lengths(here, 1, 2)},
        ),
        "DevicePlanner.variant": lambda: (planner(here).variant, {}),
        "DevicePager": lambda: (pager, {"here": here}),
        "DevicePager.update": lambda: (
            pager(here).update,
            {
                "token_to_page": lengths(here, 0, 0, 0, 1, 1, 2),
                "seq_starts": lengths(here, 0, 2),
                "seq_ends": lengths(here, 6, 6),
                "page_resident_bitmap": torch.zeros(8, dtype=torch.bool, device=here),
            },
        ),
        "DevicePager.update_from_page_table": lambda: (
            pager(here).update_from_page_table,
            {"page_table": table(here), "seq_lens": lengths(here, 40, 37)},
        ),
    }
    return arguments[name]()


@dataclass(frozen=True)
class Wrong:
    """make: of the right value and the places, a wrong one. by_kernels: torch operators take it."""

    what: str
    make: Callable[[Any, Places], Any]
    by_kernels: bool = False


def _misaligned(right: torch.Tensor, _: Places) -> torch.Tensor:
    """The same shape, strides that are legal, an address that is not."""
    room = torch.zeros(right.numel() + 1, dtype=right.dtype, device=right.device)
    return room[1:].view(right.shape)


def _odd_rows(right: torch.Tensor, _: Places) -> torch.Tensor:
    """Rows that are 68 elements apart: 136 bytes, no multiple of 16."""
    wide = right.new_zeros(*right.shape[:-1], right.shape[-1] + 4)
    return wide[..., : right.shape[-1]]


ELSEWHERE = Wrong("elsewhere", lambda right, places: right.to(places.elsewhere))
META = Wrong("meta", lambda right, _: right.to("meta"))
SPARSE = Wrong("sparse", lambda right, _: right.to_sparse())
STRIDED = Wrong("strided", lambda right, _: right.repeat_interleave(2, -1)[..., ::2])
EXPANDED = Wrong("expanded", lambda right, _: right[..., :1].expand(right.shape))
WIDER = Wrong("int64", lambda right, _: right.long())
MISALIGNED = Wrong("misaligned", _misaligned, by_kernels=True)
ODD_ROWS = Wrong("rows 68 apart", _odd_rows, by_kernels=True)
GRADIENT = Wrong("gradient", lambda right, _: right.clone().requires_grad_())
TENSORS = [ELSEWHERE, META, SPARSE]
ACTIVATION = [*TENSORS, STRIDED, EXPANDED, MISALIGNED, ODD_ROWS, GRADIENT]
NUMBER_ON_DEVICE = [
    Wrong(
        "a number on a device",
        lambda _, places: torch.ones(
            (), device=places.here if places.here != "cpu" else places.elsewhere
        ),
    )
]


def value(*values: Any) -> list[Wrong]:
    return [Wrong(repr(v), lambda _, places, v=v: v) for v in values]


FP8_PAGES = [ELSEWHERE, META, MISALIGNED, ODD_ROWS]
SCALE = [
    *TENSORS,
    GRADIENT,
    Wrong("float64", lambda right, _: right.double()),
    Wrong("one for each sequence", lambda right, _: right.expand(3, 2).contiguous()),
    *value(1.0),
]


def made(what: str, make: Callable[[str], Any]) -> Wrong:
    """From the device of what is right."""
    return Wrong(what, lambda _, places: make(places.here))


NO_DEVICE = [*value("cuda:99", "cuda:-7", "toaster", 1.5)]
TABLE: dict[str, dict[str, list[Wrong]]] = {
    "attention": {
        **dict.fromkeys(("q", "k", "v"), ACTIVATION),
        "sinks": [ELSEWHERE, META, SPARSE, GRADIENT],
        "scale": NUMBER_ON_DEVICE,
        "softcap": NUMBER_ON_DEVICE,
    },
    "attention, packed": {
        "cu_seqlens_q": [*TENSORS, WIDER],
        "cu_seqlens_k": [*TENSORS, WIDER],
        "max_seqlen_q": NUMBER_ON_DEVICE,
    },
    "paged_attention": {
        **dict.fromkeys(("q", "k_pages", "v_pages"), ACTIVATION),
        "plan": [ELSEWHERE],
        "sinks": [ELSEWHERE, META, SPARSE],
        "tree_mask": [*TENSORS, Wrong("int32", lambda right, _: right.int())],
        "tree_positions": [*TENSORS, WIDER],
        "out": [*TENSORS, STRIDED, MISALIGNED, ODD_ROWS],
    },
    "paged_attention, planned inside": {
        **dict.fromkeys(("q", "k_pages", "v_pages"), ACTIVATION),
        "page_table": [
            *TENSORS,
            made("a page id beyond the pool", lambda here: table(here) + 6),
            made("a page id below 0", lambda here: table(here) - 1),
        ],
        "seq_lens": [
            *TENSORS,
            made("beyond the table", lambda here: lengths(here, 40, 49)),
            made("below 0", lambda here: lengths(here, -1, 40)),
        ],
        "cu_seqlens_q": [
            *TENSORS,
            made("too few rows", lambda here: lengths(here, 0, 1, 2)),
            made("not from 0", lambda here: lengths(here, 1, 2, 3)),
            made("decreasing", lambda here: lengths(here, 0, 4, 3)),
            made("too many", lambda here: lengths(here, 0, 1, 2, 3)),
        ],
        "out": [*TENSORS, STRIDED, MISALIGNED, ODD_ROWS],
    },
    "paged_attention, fp8": {
        **dict.fromkeys(("k_pages", "v_pages"), FP8_PAGES),
        **dict.fromkeys(("k_scale", "v_scale"), SCALE),
    },
    "layout_from_page_table": {
        "page_table": [
            *TENSORS,
            made("a page id beyond the pool", lambda here: table(here) + 6),
            made("a page id below 0", lambda here: table(here) - 1),
        ],
        "seq_lens": [
            *TENSORS,
            made("beyond the table", lambda here: lengths(here, 40, 49)),
            made("below 0", lambda here: lengths(here, -1, 40)),
        ],
        "page_resident_bitmap": TENSORS,
    },
    "layout_from_csr": dict.fromkeys(("indptr", "indices", "last_page_len"), TENSORS),
    "build_layout": {
        "token_to_page": [
            *TENSORS,
            made("a page id beyond the pool", lambda here: lengths(here, 0, 0, 9, 9, 9, 9)),
        ],
        "seq_starts": TENSORS,
        "seq_ends": [*TENSORS, made("beyond the map", lambda here: lengths(here, 6, 7))],
    },
    "plan": {
        "q_lens": [
            made("elsewhere", lambda here: lengths("meta", 1, 2)),
            made("below 0", lambda here: lengths(here, 1, -1)),
            made("beyond the sequence", lambda here: lengths(here, 1, 38)),
            made("too many", lambda here: lengths(here, 1, 1, 1)),
        ],
        "cu_seqlens_q": [
            made("elsewhere", lambda here: lengths("meta", 0, 1, 2)),
            made("too few", lambda here: lengths(here, 0, 1)),
        ],
    },
    "append_kv": {
        **dict.fromkeys(("k", "v", "k_pages", "v_pages"), TENSORS),
        **dict.fromkeys(("page_table", "seq_lens", "q_lens"), TENSORS),
    },
    "append_kv, by slots": {"slot_mapping": TENSORS},
    "append_kv, fp8": {
        **dict.fromkeys(("k_pages", "v_pages"), FP8_PAGES[:2]),
        **dict.fromkeys(("k_scale", "v_scale"), SCALE),
    },
    "DevicePlanner": {
        "device": NO_DEVICE,
        "capacities": [
            made("no sequence", lambda _: flashcore.Capacities(0, 16, 8)),
            made("no page", lambda _: flashcore.Capacities(4, 0, 8)),
            made("no query", lambda _: flashcore.Capacities(4, 16, 0)),
            made("too many queries", lambda _: flashcore.Capacities(4, 16, 2**31)),
            made("too few segments", lambda _: flashcore.Capacities(4, 16, 8, max_segments=2)),
        ],
        "workspace": [
            made("elsewhere", lambda here: torch.zeros(1 << 20, device="meta")),
            made("too small", lambda here: torch.zeros(64, device=here)),
            made("bf16", lambda here: torch.zeros(1 << 20, device=here).bfloat16()),
            made("strided", lambda here: torch.zeros(1 << 21, device=here)[::2]),
            made("misaligned", lambda here: torch.zeros((1 << 20) + 1, device=here)[1:]),
        ],
        "num_pages": value(0, 2**31 - 1, 8.0),
        "page_tokens": value(0, 2.5),
        "tile_m": value(0, "64"),
        "num_workers": value(-1, 1.5),
    },
    "DevicePlanner.update": {
        "page_table": [
            *TENSORS,
            WIDER,
            STRIDED,
            made("too many rows", lambda here: table(here)[[0, 1, 0, 1, 0]]),
            made("one axis", lambda here: table(here)[0]),
        ],
        "seq_lens": [*TENSORS, WIDER, made("too many", lambda here: lengths(here, 4, 4, 4))],
        "q_lens": [*TENSORS, WIDER, made("too many", lambda here: lengths(here, 1, 1, 1))],
    },
    "DevicePlanner.update, by ends": {
        "cu_seqlens_q": [
            *TENSORS,
            WIDER,
            made("too many", lambda here: lengths(here, 0, 1, 2, 3)),
            made("none", lambda here: lengths(here)),
            *value(3),
        ],
        "q_lens": [made("beside ends", lambda here: lengths(here, 1, 2))],
    },
    "DevicePlanner.update_from_layout": {
        "layout": [
            made("other pages", lambda here: pager(here, page_tokens=8).layout),
            made("another pool", lambda here: pager(here, num_pages=9).layout),
            made("more entries", lambda here: pager(here, max_entries=17).layout),
            *value(None, 3),
        ],
        "q_lens": [
            *TENSORS,
            WIDER,
            made("too many", lambda here: lengths(here, 1, 1, 1, 1, 1)),
        ],
    },
    "DevicePlanner.variant": {"max_q": value(9, "8"), "tile_m": value(-1, "64")},
    "DevicePager": {
        "device": NO_DEVICE,
        "max_batch": value(0, 1.5),
        "max_entries": value(0, 2**31),
        "max_tokens": value(-1, 2**31, "x"),
        "num_pages": value(0, 2**31),
        "page_tokens": value(0, None),
    },
    "DevicePager.update": {
        "token_to_page": [
            *TENSORS,
            WIDER,
            STRIDED,
            made("too long", lambda here: lengths(here, *range(65))),
        ],
        "seq_starts": [*TENSORS, WIDER, STRIDED],
        "seq_ends": [*TENSORS, WIDER, STRIDED, made("too few", lambda here: lengths(here, 6))],
        "page_resident_bitmap": [
            *TENSORS,
            WIDER,
            made("too short", lambda here: torch.zeros(7, dtype=torch.bool, device=here)),
        ],
    },
    "DevicePager.update_from_page_table": {
        "page_table": [*TENSORS, WIDER, STRIDED],
        "seq_lens": [*TENSORS, WIDER, made("too few", lambda here: lengths(here, 40))],
    },
}
CASES = [
    (name, argument, wrong)
    for name, arguments in TABLE.items()
    for argument, wrongs in arguments.items()
    for wrong in wrongs
]


def case_id(case: tuple[str, str, Wrong]) -> str:
    name, argument, wrong = case
    return f"{name}-{argument}-{wrong.what}"


# Names by which an error may speak of an argument: the limit that it breaks.
ALSO = {
    "capacities": "max_batch|max_entries|max_q|max_segments",
    "page_table": "page_table|max_batch",
}


def refused(case: tuple[str, str, Wrong], places: Places) -> str:
    """What the function says of the wrong argument; AssertionError where it takes it."""
    name, argument, wrong = case
    function, arguments = valid(name, places.here)
    arguments[argument] = wrong.make(arguments.get(argument), places)
    try:
        function(**arguments)
    except (TypeError, ValueError, NotImplementedError) as error:
        return str(error)
    raise AssertionError(f"{case_id(case)} was taken")
