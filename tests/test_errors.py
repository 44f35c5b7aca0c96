"""Every argument of every public function, given every wrong kind of value: one error names it.

Nothing that is wrong may be taken for something else, and no error may come from the depths: the
message begins with, or contains as a word, the name of the argument that is at fault.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch

import flashcore

PAGE = 4
TABLE = torch.tensor([[0, 1, 2], [0, 1, 3]], dtype=torch.int32)
LENGTHS = torch.tensor([9, 10], dtype=torch.int32)
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def layout() -> flashcore.Layout:
    return flashcore.layout_from_page_table(TABLE, LENGTHS, page_tokens=PAGE)


def plan() -> flashcore.Plan:
    return flashcore.plan(layout(), q_lens=[1, 2], page_tokens=PAGE, **HEADS)


def valid(name: str) -> dict[str, Any]:
    """Arguments that each function takes, made anew."""
    q, k = torch.randn(2, 5, 4, 8), torch.randn(2, 7, 2, 8)
    pages = torch.randn(4, PAGE, 2, 8)
    packed = {"q": torch.randn(5, 4, 8), "k": torch.randn(7, 2, 8), "v": torch.randn(7, 2, 8)}
    return {
        "attention": {"q": q, "k": k, "v": k.clone(), "sinks": torch.zeros(4)},
        "attention, packed": {
            **packed,
            "cu_seqlens_q": torch.tensor([0, 2, 5], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor([0, 3, 7], dtype=torch.int32),
            "max_seqlen_q": 3,
        },
        "paged_attention": {
            "q": torch.randn(3, 4, 8),
            "k_pages": pages,
            "v_pages": pages.clone(),
            "plan": plan(),
            "sinks": torch.zeros(4),
            "tree_mask": torch.ones(3, 2, dtype=torch.bool),
            "tree_positions": torch.tensor([0, 0, 1], dtype=torch.int32),
            "out": torch.zeros(3, 4, 8),
        },
        "paged_attention, planned inside": {
            "q": torch.randn(3, 4, 8),
            "k_pages": pages,
            "v_pages": pages.clone(),
            "page_table": TABLE,
            "seq_lens": LENGTHS,
            "cu_seqlens_q": torch.tensor([0, 1, 3]),
            "out": torch.zeros(3, 4, 8),
        },
        "paged_attention, fp8": {
            "q": torch.randn(3, 4, 8).bfloat16(),
            "k_pages": pages.to(torch.float8_e4m3fn),
            "v_pages": pages.to(torch.float8_e4m3fn),
            "plan": plan(),
            "k_scale": torch.ones(2),
            "v_scale": torch.tensor(2.0),
        },
        "plan": {
            "layout": layout(),
            "page_tokens": PAGE,
            "cu_seqlens_q": torch.tensor([0, 1, 3]),
            **HEADS,
        },
        "layout_from_csr": {
            "indptr": torch.tensor([0, 2, 2, 5]),
            "indices": torch.tensor([3, 0, 3, 1, 2]),
            "last_page_len": torch.tensor([1, 0, 4]),
            "page_tokens": PAGE,
        },
        "layout_from_page_table": {
            "page_table": TABLE,
            "seq_lens": LENGTHS,
            "page_tokens": PAGE,
            "page_resident_bitmap": torch.zeros(4, dtype=torch.bool),
        },
        "build_layout": {
            "token_to_page": torch.tensor([0, 0, 0, 0, 1, 1], dtype=torch.int32),
            "seq_starts": torch.tensor([0, 2], dtype=torch.int32),
            "seq_ends": torch.tensor([6, 6], dtype=torch.int32),
            "page_tokens": PAGE,
        },
        "append_kv": {
            "k": torch.randn(2, 2, 8),
            "v": torch.randn(2, 2, 8),
            "k_pages": pages,
            "v_pages": pages.clone(),
            "slot_mapping": torch.tensor([1, 2]),
        },
        "append_kv, fp8": {
            "k": torch.randn(2, 2, 8),
            "v": torch.randn(2, 2, 8),
            "k_pages": pages.to(torch.float8_e5m2),
            "v_pages": pages.to(torch.float8_e5m2),
            "slot_mapping": torch.tensor([1, 2]),
            "k_scale": torch.ones(2),
            "v_scale": torch.tensor(2.0),
        },
        "append_kv, by table": {
            "k": torch.randn(3, 2, 8),
            "v": torch.randn(3, 2, 8),
            "k_pages": pages,
            "v_pages": pages.clone(),
            "page_table": TABLE,
            "seq_lens": LENGTHS,
            "q_lens": [1, 2],
        },
        "DevicePlanner": {
            "capacities": flashcore.Capacities(4, 16, 8),
            "num_pages": 64,
            "device": "cpu",
            **HEADS,
        },
    }[name]


@dataclass(frozen=True)
class Wrong:
    """A value made from the right one, and what it is called."""

    what: str
    make: Callable[[Any], Any]


def constants(*values: Any) -> list[Wrong]:
    return [Wrong(repr(value), lambda _, value=value: value) for value in values]


# What no argument of the kind may be.
NO_TENSOR = [
    *constants(3, "x", 1.5, [1, 2], {}, True),
    Wrong("numpy", lambda right: np.zeros(tuple(right.shape), dtype=np.float32)),
]
ANY_TENSOR = [
    *NO_TENSOR,
    Wrong("meta", lambda right: right.to("meta")),
    Wrong("sparse", lambda right: right.to_sparse()),
    Wrong("one axis more", lambda right: right[None]),
    Wrong("complex", lambda right: right.to(torch.complex64)),
]
ACTIVATIONS = [
    *ANY_TENSOR,
    Wrong("int", lambda right: right.int()),
    Wrong("double", lambda right: right.double()),
    Wrong("bool", lambda right: right.bool()),
    Wrong("gradient", lambda right: right.clone().requires_grad_()),
]
SCALES = [
    *ANY_TENSOR[:-2],
    Wrong("one for each sequence", lambda right: right.expand(3, 2)),
    Wrong("too many", lambda right: torch.ones(4)),
    Wrong("one axis of one", lambda right: torch.ones(1)),
    Wrong("half", lambda right: right.half()),
    Wrong("double", lambda right: right.double()),
    Wrong("int", lambda right: right.int()),
    Wrong("gradient", lambda right: right.clone().requires_grad_()),
]
FP8_PAGES = [
    *NO_TENSOR,
    Wrong("the other format", lambda right: right.float().to(OTHER_FP8[right.dtype])),
    Wrong("16 bits", lambda right: right.half()),
    Wrong("bytes", lambda right: right.view(torch.uint8)),
    Wrong("fnuz", lambda right: right.float().to(torch.float8_e4m3fnuz)),
    Wrong("meta", lambda right: right.to("meta")),
]
OTHER_FP8 = {
    torch.float8_e4m3fn: torch.float8_e5m2,
    torch.float8_e5m2: torch.float8_e4m3fn,
}
INTS = [
    *ANY_TENSOR,
    Wrong("float", lambda right: right.float()),
    Wrong("bool", lambda right: right.bool()),
    Wrong("int16", lambda right: right.short()),
]
NUMBER = constants("3", 1.5, True, [3], 0, -1, 10**30, math.nan, np.float64(2), torch.tensor(2.5))
FLAG = constants("no", "", 1, 0, 1.0, [], np.array([True]))
SCALE = constants("x", math.nan, math.inf, 0.0, -1.0, True, [1.0], 10**400, torch.ones(2), 1j)
SOFTCAP = constants("x", math.nan, math.inf, -1.0, True, [1.0], 10**400, torch.ones(2), 1j, None)
WINDOW = constants(
    *("x", 3, 1.5, True, (1,), (1, 2, 3), (1.5, 2), (-2, 0), (0, -7), (True, 0), ("a", 0), ()),
    *((None, 1), (math.nan, 0), {1: 2}, torch.zeros(2)),
)
NONE = constants(None)
LENGTHS_LIST = constants(
    *(1, "12", 1.5, [1.5, 1], [1], [1, 1, 1], [-1, 1], [2**40, 1], [None, 1], [[1, 1]], ["1", 1]),
    *([True, 1], {}, np.array([1.5, 1.0])),
)
RULES = {"causal": FLAG, "scale": SCALE, "window": WINDOW, "softcap": SOFTCAP, "return_lse": FLAG}

TABLE_OF_ERRORS: dict[str, dict[str, list[Wrong]]] = {
    "attention": {
        **dict.fromkeys(("q", "k", "v"), ACTIVATIONS + NONE),
        "sinks": ACTIVATIONS,
        **RULES,
    },
    "attention, packed": {
        "cu_seqlens_q": INTS + NONE,
        "cu_seqlens_k": INTS + NONE,
        "max_seqlen_q": [w for w in NUMBER if w.what not in ("1000000000000000000000000000000",)],
    },
    "paged_attention": {
        **dict.fromkeys(("q", "k_pages", "v_pages"), ACTIVATIONS + NONE),
        "plan": constants(None, 3, "x", [], torch.zeros(3)),
        "sinks": ACTIVATIONS,
        "tree_mask": [*ANY_TENSOR, Wrong("int", lambda right: right.int())],
        "tree_positions": INTS,
        "out": [w for w in ACTIVATIONS if w.what != "gradient"],
        **RULES,
    },
    "paged_attention, planned inside": {
        **dict.fromkeys(("q", "k_pages", "v_pages"), ACTIVATIONS + NONE),
        "plan": constants(3, "x", [], torch.zeros(3)),
        "page_table": INTS + NONE,
        "seq_lens": INTS + NONE,
        "cu_seqlens_q": INTS,
        "out": [w for w in ACTIVATIONS if w.what != "gradient"],
        **RULES,
    },
    "paged_attention, fp8": {
        "q": [*ACTIVATIONS, Wrong("fp8", lambda right: right.to(torch.float8_e4m3fn))],
        **dict.fromkeys(("k_pages", "v_pages"), FP8_PAGES + NONE),
        **dict.fromkeys(("k_scale", "v_scale"), SCALES),
    },
    "plan": {
        "layout": constants(None, 3, "x", torch.zeros(3, dtype=torch.int32)),
        "q_lens": LENGTHS_LIST,
        **dict.fromkeys(("num_q_heads", "num_kv_heads", "head_dim"), NUMBER + NONE),
        "v_head_dim": NUMBER,
        "itemsize": NUMBER,
        "dtype": constants(2, "bf16", np.float16, torch.zeros(1)),
        "cu_seqlens_q": [w for w in INTS if w.what not in ("one axis more",)],
        "tile_m": NUMBER,
        "num_workers": [w for w in NUMBER if w.what != "0"],
        "share": FLAG + NONE,
        "fold": [*constants("sometimes", 2, [], None, 1.0)],
        "batch_invariant": FLAG + NONE,
        "page_tokens": NUMBER,
    },
    "layout_from_page_table": {
        "page_table": INTS + NONE,
        "seq_lens": INTS + NONE,
        "page_tokens": NUMBER + NONE,
        "page_resident_bitmap": ANY_TENSOR,
        "num_pages": NUMBER,
    },
    "layout_from_csr": {
        **dict.fromkeys(("indptr", "indices", "last_page_len"), INTS + NONE),
        "page_tokens": NUMBER + NONE,
        "num_pages": NUMBER,
    },
    "build_layout": {
        "token_to_page": INTS + NONE,
        "seq_starts": INTS + NONE,
        "seq_ends": INTS + NONE,
        "page_tokens": NUMBER + NONE,
        "num_pages": NUMBER,
    },
    "append_kv": {
        **dict.fromkeys(("k", "v", "k_pages", "v_pages"), ACTIVATIONS[:-1] + NONE),
        "slot_mapping": INTS,
    },
    "append_kv, fp8": {
        **dict.fromkeys(("k", "v"), ACTIVATIONS[:-1] + NONE),
        **dict.fromkeys(("k_pages", "v_pages"), FP8_PAGES + NONE),
        **dict.fromkeys(("k_scale", "v_scale"), SCALES),
    },
    "DevicePlanner": {
        "capacities": constants(None, 3, "x", {}),
        **dict.fromkeys(("num_pages", "num_q_heads", "num_kv_heads", "head_dim"), NUMBER + NONE),
        "v_head_dim": NUMBER,
        "page_tokens": NUMBER + NONE,
        "itemsize": NUMBER,
        "dtype": constants(2, "bf16", np.float16, torch.zeros(1)),
        "tile_m": NUMBER + NONE,
        "num_workers": [w for w in NUMBER if w.what != "0"],
        "fold": constants("sometimes", 2, [], None, 1.0),
        "batch_invariant": FLAG + NONE,
        "workspace": [*NO_TENSOR[:-1], Wrong("int", lambda _: torch.zeros(1 << 20).int())],
        "scratch": constants(3, "x", {}),
    },
    "append_kv, by table": {
        "page_table": INTS,
        "seq_lens": INTS,
        "q_lens": LENGTHS_LIST,
    },
}


def cases() -> Iterator[Any]:
    for function, arguments in TABLE_OF_ERRORS.items():
        for argument, wrongs in arguments.items():
            for wrong in wrongs:
                yield pytest.param(
                    function, argument, wrong, id=f"{function}-{argument}-{wrong.what}"
                )


CASES = list(cases())


@pytest.mark.parametrize(("name", "argument", "wrong"), CASES)
def test_the_argument_is_named(name: str, argument: str, wrong: Wrong) -> None:
    function = getattr(flashcore, name.split(",")[0])
    arguments = valid(name)
    arguments[argument] = wrong.make(arguments.get(argument))
    with pytest.raises((TypeError, ValueError)) as raised:
        function(**arguments)
    assert re.search(rf"\b{argument}\b", str(raised.value)), str(raised.value)
    # Not one from the depths: ours say what the argument must be, or what goes with what.
    assert "\n" not in str(raised.value)


def planner() -> flashcore.DevicePlanner:
    return flashcore.DevicePlanner(**valid("DevicePlanner"))


NO_COUNT = (-1, "2", 2.5, True, [2])
METHODS: dict[str, tuple[Callable[[], Callable[..., Any]], tuple[Any, ...]]] = {
    "Plan.to(device)": (lambda: plan().to, ("toaster", 3, None, 1.5, "cuda:99")),
    "PlanStats.bytes_once(dtype)": (
        lambda: plan().stats().bytes_once,
        ("bf16", 2, None, torch.zeros(1)),
    ),
    "PlanStats.bytes_per_sequence(dtype)": (
        lambda: plan().stats().bytes_per_sequence,
        ("bf16", 2, None, torch.zeros(1)),
    ),
    "DevicePlanner.trimmed(batch)": (lambda: planner().trimmed, (*NO_COUNT, None, 5)),
    "DevicePlanner.variant(max_q)": (lambda: planner().variant, (*NO_COUNT, 0, 9)),
    "DevicePlanner.variant(tile_m)": (lambda: planner().variant, (*NO_COUNT, 0)),
    "DevicePlanner.variant(fold)": (lambda: planner().variant, ("sometimes", 2, [], 1.0)),
}


@pytest.mark.parametrize(
    ("method", "value"),
    [(name, value) for name, (_, values) in METHODS.items() for value in values],
)
def test_arguments_of_methods_are_named(method: str, value: Any) -> None:
    argument = method[method.index("(") + 1 : -1]
    with pytest.raises((TypeError, ValueError), match=rf"^{argument} must be"):
        METHODS[method][0]()(**{argument: value})


@pytest.mark.parametrize("field", [f.name for f in fields(flashcore.Capacities)])
@pytest.mark.parametrize("value", ["4", 4.0, None, True, False, -1, [4], torch.tensor(4)], ids=repr)
def test_a_capacity_is_named(field: str, value: Any) -> None:
    room = {"max_batch": 4, "max_entries": 16, "max_q": 8, field: value}
    arguments = valid("DevicePlanner") | {"capacities": flashcore.Capacities(**room)}
    with pytest.raises((TypeError, ValueError), match=rf"^{field} must be"):
        flashcore.DevicePlanner(**arguments)


@pytest.mark.parametrize("name", list(TABLE_OF_ERRORS))
def test_the_right_arguments_are_taken(name: str) -> None:
    getattr(flashcore, name.split(",")[0])(**valid(name))


def test_there_are_many() -> None:
    assert len(CASES) >= 250
