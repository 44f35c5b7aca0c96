"""Wrong inputs on a GPU: one error names the argument, and the device is none the worse."""

from __future__ import annotations

import re

import pytest
import torch

import flashcore
from flashcore.sm90.available import available
from tests.device_error_cases import (
    ALSO,
    CASES,
    HEADS,
    TABLE,
    Places,
    Wrong,
    case_id,
    layout,
    planner,
    refused,
    valid,
)

pytestmark = pytest.mark.skipif(
    not available("cuda")[0], reason=f"no Hopper GPU: {available('cuda')[1]}"
)

PLACES = Places("cuda", "cpu")


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_argument_is_named(case: tuple[str, str, Wrong]) -> None:
    said = refused(case, PLACES)
    argument = case[1]
    assert re.search(rf"\b({ALSO.get(argument, argument)})\b", said), said
    assert "\n" not in said
    torch.cuda.synchronize()  # nothing was launched that fails later


@pytest.mark.parametrize("name", TABLE)
def test_the_right_arguments_are_taken(name: str) -> None:
    function, arguments = valid(name, "cuda")
    function(**arguments)
    torch.cuda.synchronize()


def test_a_wrong_call_after_right_ones_says_the_same() -> None:
    """A remembered launch leaves the checks to the compiled function, then to those of ever."""
    for name in ("attention", "paged_attention"):
        function, right = valid(name, "cuda")
        function(**right)
        # Without a window, positions are not read.
        for case in (
            c for c in CASES if c[0] == name and c[1] in right.keys() - {"tree_positions"}
        ):
            changed = {**right, case[1]: case[2].make(right[case[1]], PLACES)}
            with pytest.raises((TypeError, ValueError)) as raised:
                function(**changed)
            assert re.search(rf"\b{case[1]}\b", str(raised.value)), (case_id(case), raised.value)
        function(**right)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"head_dim": 264}, "head_dim"),
        ({"head_dim": 100}, "head_dim"),
        ({"head_dim": 4}, "head_dim"),
    ],
)
def test_what_kernels_do_not_serve_is_named(change: dict, named: str) -> None:
    dim, dtype = change.get("head_dim", 64), change.get("dtype", torch.bfloat16)
    q, k, v = (torch.zeros(1, 8, 2, dim, dtype=dtype, device="cuda") for _ in range(3))
    with pytest.raises((ValueError, NotImplementedError), match=named):
        flashcore.attention(q, k, v)
    heads = {**HEADS, "head_dim": dim, "num_workers": 8}
    plan = flashcore.plan(layout("cuda"), q_lens=[1, 2], **heads)
    q = torch.zeros(3, 8, dim, dtype=dtype, device="cuda")
    pages = torch.zeros(8, 16, 2, dim, dtype=dtype, device="cuda")
    with pytest.raises((ValueError, NotImplementedError), match=named):
        flashcore.paged_attention(q, pages, pages, plan)
    if "head_dim" in change:
        with pytest.raises(ValueError, match="head_dim"):
            planner("cuda", head_dim=dim)


def test_another_tile_and_page_size_are_named() -> None:
    q = torch.zeros(3, 8, 64, device="cuda").bfloat16()
    wide = flashcore.layout_from_page_table(
        torch.tensor([[0, 1], [0, 2]], device="cuda"), torch.tensor([40, 37]).cuda(), page_tokens=24
    )
    plan = flashcore.plan(wide, q_lens=[1, 2], **HEADS)
    pages = torch.zeros(8, 24, 2, 64, device="cuda").bfloat16()
    with pytest.raises(ValueError, match="page_tokens"):
        flashcore.paged_attention(q, pages, pages, plan)
    plan = flashcore.plan(layout("cuda"), q_lens=[1, 2], tile_m=32, **HEADS)
    pages = torch.zeros(8, 16, 2, 64, device="cuda").bfloat16()
    with pytest.raises(ValueError, match="tile_m"):
        flashcore.paged_attention(q, pages, pages, plan)


def test_a_device_plan_is_not_for_another_shape() -> None:
    made = planner("cuda")
    plan = made.update(
        *(
            torch.tensor(x, dtype=torch.int32, device="cuda")
            for x in ([[0, 1, 2], [0, 1, 3]], [40, 37], [1, 2])
        )
    )
    q = torch.zeros(8, 8, 64, device="cuda").bfloat16()
    pages = torch.zeros(8, 16, 2, 64, device="cuda").bfloat16()
    flashcore.paged_attention(q, pages, pages, plan)
    for argument, wrong in (
        ("q", {"q": q[:, :4]}),
        ("k_pages", {"k_pages": pages[:7]}),
        ("v_pages", {"v_pages": pages[:, :8]}),
        ("out", {"out": q[:7]}),
        ("plan", {"q": q.cpu(), "k_pages": pages.cpu(), "v_pages": pages.cpu()}),
    ):
        arguments = {"q": q, "k_pages": pages, "v_pages": pages, **wrong}
        with pytest.raises((TypeError, ValueError, NotImplementedError), match=rf"\b{argument}\b"):
            flashcore.paged_attention(**arguments, plan=plan)
    torch.cuda.synchronize()
