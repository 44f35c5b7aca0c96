"""New K and V in their pages: against a loop over tokens, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashcore
from flashcore import append, triton_compiler

HEADS, DIM, V_DIM, PAGES, TOKENS = 2, 16, 8, 12, 4


def tensors(new_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(new_tokens)
    k = torch.randn(new_tokens, HEADS, DIM, generator=g)
    v = torch.randn(new_tokens, HEADS, V_DIM, generator=g)
    k_pages = torch.randn(PAGES, TOKENS, HEADS, DIM, generator=g).to(dtype)
    v_pages = torch.randn(PAGES, TOKENS, HEADS, V_DIM, generator=g).to(dtype)
    return k, v, k_pages, v_pages


def by_loop(new: torch.Tensor, pages: torch.Tensor, slots: list[int]) -> torch.Tensor:
    expected = pages.clone()
    for token, slot in enumerate(slots):
        if slot >= 0:
            expected[slot // TOKENS, slot % TOKENS] = new[token].to(pages.dtype)
    return expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "slots",
    [[5], [0, 47], [7, -1, 9, -1], [-1, -1, 3], [-1], [-1, -1], [], [0, -5, 1, 2, 46, 44, 11]],
    ids=str,
)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_slots(slots: list[int], kind: torch.dtype, dtype: torch.dtype) -> None:
    k, v, k_pages, v_pages = tensors(len(slots), dtype)
    expected = by_loop(k, k_pages, slots), by_loop(v, v_pages, slots)
    flashcore.append_kv(k, v, k_pages, v_pages, slot_mapping=torch.tensor(slots, dtype=kind))
    assert torch.equal(k_pages, expected[0])
    assert torch.equal(v_pages, expected[1])


def test_pages_of_any_strides() -> None:
    """K and V in one row of memory, heads before tokens."""
    memory = torch.zeros(PAGES, HEADS, TOKENS, DIM + V_DIM)
    k_pages, v_pages = memory.transpose(1, 2).split((DIM, V_DIM), dim=-1)
    k, v, *_ = tensors(3)
    slots = [9, 2, 30]
    expected = by_loop(k, k_pages, slots), by_loop(v, v_pages, slots)
    flashcore.append_kv(k, v, k_pages, v_pages, slot_mapping=torch.tensor(slots))
    assert torch.equal(k_pages, expected[0])
    assert torch.equal(v_pages, expected[1])
    assert int((memory != 0).any(-1).sum()) == 3 * HEADS


@pytest.mark.parametrize("given", ["list", "tensor", "ends"])
def test_page_table(given: str) -> None:
    table = torch.tensor([[3, 7, 1], [0, 11, 5], [2, 4, 6], [9, 9, 9]], dtype=torch.int32)
    seq_lens, q_lens = torch.tensor([9, 4, 7, 5]), [3, 4, 1, 0]
    slots = [3 * 0 + 7 * 4 + 2, 7 * 4 + 3, 1 * 4, 0, 1, 2, 3, 4 * 4 + 2]
    k, v, k_pages, v_pages = tensors(8)
    expected = by_loop(k, k_pages, slots), by_loop(v, v_pages, slots)
    lengths: dict[str, Any] = {
        "list": {"q_lens": q_lens},
        "tensor": {"q_lens": torch.tensor(q_lens, dtype=torch.int32)},
        "ends": {"cu_seqlens_q": torch.tensor([0, 3, 7, 8, 8], dtype=torch.int32)},
    }[given]
    flashcore.append_kv(*(k, v, k_pages, v_pages), page_table=table, seq_lens=seq_lens, **lengths)
    assert torch.equal(k_pages, expected[0])
    assert torch.equal(v_pages, expected[1])


def test_a_decode_step_sees_its_own_token() -> None:
    table = torch.tensor([[0, 1], [0, 2]], dtype=torch.int32)
    seq_lens = torch.tensor([6, 7], dtype=torch.int32)
    k, v, k_pages, _ = tensors(2)
    v, v_pages = torch.cat([v, v], -1), torch.randn_like(k_pages)
    flashcore.append_kv(k, v, k_pages, v_pages, page_table=table, seq_lens=seq_lens)
    layout = flashcore.layout_from_page_table(table, seq_lens, page_tokens=TOKENS)
    plan = flashcore.plan(
        layout, num_q_heads=HEADS, num_kv_heads=HEADS, head_dim=DIM, page_tokens=TOKENS
    )
    q = k * 100  # looks at its own key alone
    out = flashcore.paged_attention(q, k_pages, v_pages, plan, scale=1.0)
    torch.testing.assert_close(out, v)


@pytest.mark.parametrize(
    ("triton", "compiler", "missing"),
    [(True, True, ""), (False, True, "Triton is not here"), (True, False, "the compiler is not")],
)
def test_what_the_kernel_compiles_with_is_told_once(
    triton: bool,
    compiler: bool,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(triton_compiler, "find_spec", lambda name: object() if triton else None)
    monkeypatch.setattr(
        triton_compiler.shutil, "which", lambda name: "/bin/cc" if compiler else None
    )
    append.can_compile.cache_clear()
    try:
        assert append.can_compile() == append.can_compile() == (not missing)
    finally:
        append.can_compile.cache_clear()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == bool(missing)
    assert all(missing in text for text in told)


def call(**changes: Any) -> None:
    k, v, k_pages, v_pages = tensors(2)
    arguments: dict[str, Any] = {"k": k, "v": v, "k_pages": k_pages, "v_pages": v_pages}
    arguments |= {"slot_mapping": torch.tensor([1, 2])}
    if "page_table" in changes:
        arguments["slot_mapping"] = None
        arguments |= {"seq_lens": torch.tensor([3, 4])}
    flashcore.append_kv(**{**arguments, **changes})


TABLE = torch.tensor([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"slot_mapping": None}, ValueError, "needs slot_mapping, or page_table and seq_lens"),
        ({"slot_mapping": [1, 2]}, TypeError, "slot_mapping must be a torch.Tensor, got list"),
        ({"slot_mapping": torch.tensor([1.0, 2])}, TypeError, "slot_mapping must have dtype int32"),
        ({"slot_mapping": torch.tensor([1])}, ValueError, r"slot_mapping must be \[new_tokens\]"),
        ({"slot_mapping": torch.tensor([1, 48])}, ValueError, r"slot 48 .* page_tokens = 48"),
        ({"seq_lens": torch.tensor([1, 2])}, ValueError, "takes the place of page_table, seq_lens"),
        (
            {"k": torch.zeros(2, HEADS, DIM + 1)},
            ValueError,
            r"k must be \[new_tokens, \*\(2, 16\)\]",
        ),
        ({"v": torch.zeros(3, HEADS, V_DIM)}, ValueError, r"v must have the tokens of k \(2\)"),
        ({"v": torch.zeros(2, HEADS, V_DIM).int()}, TypeError, "v must have dtype float32"),
        ({"k": torch.zeros(2, HEADS, DIM, device="meta")}, ValueError, "k must be a dense tensor"),
        (
            {"v_pages": torch.zeros(PAGES, 8, HEADS, V_DIM)},
            ValueError,
            r"v_pages must have the pages, tokens and heads of k_pages \(12, 4, 2\)",
        ),
        ({"page_table": TABLE, "q_lens": [2, 1]}, ValueError, r"add up to the tokens of k \(2\)"),
        ({"page_table": TABLE, "q_lens": [3, -1]}, ValueError, "q_lens must be at least 0"),
        ({"page_table": TABLE, "q_lens": [1.0, 1]}, TypeError, r"q_lens\[0\] must be an int"),
        ({"page_table": TABLE, "q_lens": [2]}, ValueError, "one length per row of page_table"),
        (
            {"page_table": TABLE, "seq_lens": torch.tensor([0, 9])},
            ValueError,
            r"seq_lens\[0\] must be at least q_lens\[0\] \(1\)",
        ),
        (
            {"page_table": TABLE, "seq_lens": torch.tensor([8, 9])},
            ValueError,
            r"seq_lens\[1\] .* at most 8 .* got 9",
        ),
        ({"page_table": -TABLE}, ValueError, r"page_table holds the page id -\d"),
        ({"page_table": TABLE + 10}, ValueError, "slot .* is not in the cache"),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)
