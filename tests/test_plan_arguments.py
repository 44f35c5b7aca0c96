"""Other ways to say the same to `plan`: ends for lengths, a dtype for its bytes."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

import flashcore

TABLE = torch.tensor([[0, 1, 2], [0, 1, 3], [0, 4, 5]], dtype=torch.int32)
HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 8}


def layout() -> flashcore.Layout:
    return flashcore.layout_from_page_table(TABLE, torch.tensor([9, 10, 8]), page_tokens=4)


def same(a: flashcore.Plan, b: flashcore.Plan) -> bool:
    pairs = ((getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.init)
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_ends_say_what_lengths_say(kind: torch.dtype) -> None:
    ends = torch.tensor([0, 1, 1, 4], dtype=kind)
    by_ends = flashcore.plan(layout(), cu_seqlens_q=ends, **HEADS)
    assert same(by_ends, flashcore.plan(layout(), q_lens=[1, 0, 3], **HEADS))
    assert not same(by_ends, flashcore.plan(layout(), **HEADS))


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([0, 1, 2], r"one element more than sequences \(3\), got 3"),
        ([1, 2, 3, 4], "cu_seqlens_q must begin with 0, got 1"),
        ([0, 2, 1, 4], "cu_seqlens_q must not decrease"),
    ],
)
def test_ends_that_are_none(ends: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flashcore.plan(layout(), cu_seqlens_q=torch.tensor(ends), **HEADS)


def test_both_are_too_much() -> None:
    with pytest.raises(ValueError, match="cu_seqlens_q takes the place of q_lens"):
        flashcore.plan(layout(), q_lens=[1, 1, 1], cu_seqlens_q=torch.tensor([0, 1, 2, 3]), **HEADS)


def test_a_dtype_says_its_bytes() -> None:
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float8_e4m3fn, 1)):
        by_dtype = flashcore.plan(layout(), dtype=dtype, **HEADS)
        assert same(by_dtype, flashcore.plan(layout(), itemsize=itemsize, **HEADS))
    assert flashcore.plan(layout(), dtype=torch.float32, itemsize=4, **HEADS).total_q == 3
    with pytest.raises(
        ValueError, match=r"itemsize must be that of dtype torch\.float32, 4, got 2"
    ):
        flashcore.plan(layout(), dtype=torch.float32, itemsize=2, **HEADS)
