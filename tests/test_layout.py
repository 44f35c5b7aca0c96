"""The pager against the oracle, and its errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashcore
from tests import oracle
from tests.cases import ABSURD_PAGE, Batch, batches


def rows_of(layout: flashcore.Layout) -> list[list[tuple[int, int]]]:
    ends = layout.row_offsets.tolist()
    pairs = list(zip(layout.cols.tolist(), layout.token_counts.tolist(), strict=True))
    return [pairs[a:b] for a, b in itertools.pairwise(ends)]


@st.composite
def token_maps(draw: st.DrawFn):
    """A token map with long runs, returning pages, gaps between sequences and overlapping ones."""
    runs = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=12))
    pages = [page for page, length in runs for _ in range(length)]
    bounds = st.tuples(st.integers(0, len(pages)), st.integers(0, len(pages)))
    ranges = [tuple(sorted(b)) for b in draw(st.lists(bounds, max_size=6))]
    used = {t for a, b in ranges for t in range(a, b)}
    pages = [p if t in used else ABSURD_PAGE * (-1) ** t for t, p in enumerate(pages)]
    resident = draw(st.sets(st.integers(0, 5)))
    return pages, ranges, draw(st.integers(1, 5)), resident


def bitmap(resident: set[int], form: str, num_pages: int) -> torch.Tensor:
    flags = torch.zeros(num_pages, dtype=torch.bool)
    flags[sorted(resident)] = True
    if form == "words":
        words = [0] * -(-num_pages // 32)
        for page in resident:
            words[page // 32] |= 1 << (page % 32)
        words = [w - (1 << 32) if w >= 1 << 31 else w for w in words]
        return torch.tensor(words, dtype=torch.int32)
    return flags.to(torch.uint8) if form == "bytes" else flags


@settings(max_examples=300, deadline=None)
@given(token_maps(), st.sampled_from(["flags", "bytes", "words"]), st.sampled_from([32, 64]))
def test_token_map_against_oracle(case, form, bits):
    pages, ranges, page_tokens, resident = case
    dtype = torch.int32 if bits == 32 else torch.int64
    layout = flashcore.build_layout(
        torch.tensor(pages, dtype=dtype),
        torch.tensor([a for a, _ in ranges], dtype=dtype),
        torch.tensor([b for _, b in ranges], dtype=dtype),
        bitmap(resident, form, 6),
        page_tokens=page_tokens,
        num_pages=6,
    )
    expected = oracle.layout_rows([pages[a:b] for a, b in ranges], page_tokens)
    assert rows_of(layout) == expected
    assert layout.staging_ids.tolist() == oracle.staging(expected, resident)
    assert all(t.dtype == torch.int32 for t in layout[:-1])


@settings(max_examples=200, deadline=None)
@given(batches(ragged=False))
def test_page_table_against_oracle(batch: Batch):
    table = batch.page_table.tolist()
    expected = []
    for row, length in zip(table, batch.kv_lens, strict=True):
        p = batch.page_tokens
        expected.append([(row[i // p], min(p, length - i)) for i in range(0, length, p)])
    assert rows_of(batch.layout) == expected
    assert batch.layout.staging_ids.tolist() == oracle.staging(expected, set())


def test_page_31_of_a_word_is_resident():
    """The top bit of a word makes it negative; the shift must not smear it over other pages."""
    tokens = torch.arange(64, dtype=torch.int32)
    words = bitmap({31, 32, 63}, "words", 64)
    ends = torch.tensor([64], dtype=torch.int32)
    layout = flashcore.build_layout(tokens, torch.zeros_like(ends), ends, words, page_tokens=1)
    assert layout.staging_ids.tolist() == [p for p in range(64) if p not in (31, 32, 63)]


def test_both_forms_agree_on_a_large_batch():
    torch.manual_seed(0)
    table = torch.randint(0, 10**6, (16, 64))
    table[:, 1:] += (table[:, 1:] == table[:, :-1]).long()  # a token map joins equal neighbours
    tokens = table.repeat_interleave(16, 1).flatten()
    starts = torch.arange(16) * 1024
    lens = torch.randint(0, 1025, (16,))
    by_tokens = flashcore.build_layout(tokens, starts, starts + lens, page_tokens=16)
    by_pages = flashcore.layout_from_page_table(table, lens, page_tokens=16)
    assert by_tokens.page_tokens == by_pages.page_tokens == 16
    for a, b in zip(by_tokens[:-1], by_pages[:-1], strict=True):
        assert torch.equal(a, b)


def build(pages=(0, 0, 1), starts=(0,), ends=(3,), dtype=torch.int32, **options):
    make = lambda x: x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=dtype)  # noqa: E731
    return flashcore.build_layout(make(pages), make(starts), make(ends), **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"ends": (4,)}, ValueError, r"seq_ends\[0\] must be at most .* \(3\), got 4"),
        ({"starts": (2,), "ends": (1,)}, ValueError, r"seq_ends\[0\] must be at least .* 2, got 1"),
        ({"starts": (-1,)}, ValueError, r"seq_starts\[0\] must be at least 0, got -1"),
        ({"ends": (1, 2)}, ValueError, r"seq_ends must have as many elements as seq_starts \(1\)"),
        ({"pages": (0, -7, 1)}, ValueError, r"token_to_page holds the page id -7"),
        ({"pages": (0, 9, 1), "num_pages": 9}, ValueError, r"page id 9; .* below num_pages = 9"),
        ({"page_tokens": 0}, ValueError, r"page_tokens must be at least 1, got 0"),
        ({"page_tokens": 1.5}, TypeError, r"page_tokens must be an int, got float"),
        ({"num_pages": 0}, ValueError, r"num_pages must be at least 1"),
        ({"dtype": torch.float32}, TypeError, r"token_to_page must have dtype int32, int64"),
        ({"pages": ((0, 1),)}, ValueError, r"token_to_page must have 1 dimensions"),
        (
            {"page_resident_bitmap": torch.ones(2, dtype=torch.bool), "num_pages": 3},
            ValueError,
            r"page_resident_bitmap must cover num_pages = 3 pages, it covers 2",
        ),
        (
            {"page_resident_bitmap": torch.ones(1, dtype=torch.bool)},
            ValueError,
            r"page id 1; page ids must be below num_pages = 1",
        ),
        (
            {"page_resident_bitmap": torch.ones(9)},
            TypeError,
            r"page_resident_bitmap must have dtype bool, uint8, int32, got float32",
        ),
        (
            {"ends": torch.ones(1, dtype=torch.int32, device="meta")},
            ValueError,
            r"seq_ends must be on the device of token_to_page \(cpu\), got meta",
        ),
    ],
)
def test_build_layout_names_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        build(**arguments)


@pytest.mark.parametrize(
    ("table", "lens", "message"),
    [
        ([[0, 1]], [9], r"seq_lens\[0\] = 9 is beyond page_table, whose 2 columns hold at most 8"),
        ([[0, 1]], [-1], r"seq_lens\[0\] must be at least 0, got -1"),
        ([[0, 1]], [4, 4], r"seq_lens must have one length per row of page_table \(1\), got 2"),
        ([[0, -3]], [8], r"page_table holds the page id -3"),
        ([[0, 8]], [8], r"page_table holds the page id 8; page ids must be below num_pages = 8"),
    ],
)
def test_page_table_names_what_is_wrong(table, lens, message):
    with pytest.raises(ValueError, match=message):
        flashcore.layout_from_page_table(
            torch.tensor(table), torch.tensor(lens), page_tokens=4, num_pages=8
        )


def test_unused_slots_may_hold_anything():
    table = torch.tensor([[0, ABSURD_PAGE], [-5, -5]])
    lens = torch.tensor([4, 0])
    layout = flashcore.layout_from_page_table(table, lens, page_tokens=4, num_pages=1)
    assert layout.cols.tolist() == [0]
    assert layout.row_offsets.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: t.to("meta"), "one that is on the meta device"),
        (lambda t: t.to_sparse(), "one that is torch.sparse_coo"),
    ],
)
def test_tables_without_contents_are_named(change, what):
    table, lens = torch.zeros(1, 2, dtype=torch.int32), torch.tensor([4])
    with pytest.raises(ValueError, match=f"page_table must be a dense .* got {what}"):
        flashcore.layout_from_page_table(change(table), change(lens), page_tokens=4)
    with pytest.raises(ValueError, match=f"token_to_page must be a dense .* got {what}"):
        flashcore.build_layout(change(lens), change(lens), change(lens))


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_lists_of_pages_are_the_page_table(kind: torch.dtype) -> None:
    table = torch.tensor([[5, 2, 9], [0, 0, 0], [5, 2, 1], [7, 0, 0]])
    lengths = torch.tensor([9, 0, 12, 3])
    expected = flashcore.layout_from_page_table(table, lengths, page_tokens=4, num_pages=10)
    found = flashcore.layout_from_csr(
        torch.tensor([0, 3, 3, 6, 7], dtype=kind),
        torch.tensor([5, 2, 9, 5, 2, 1, 7], dtype=kind),
        torch.tensor([1, 99, 4, 3], dtype=kind),
        page_tokens=4,
        num_pages=10,
    )
    for name in ("row_offsets", "cols", "token_counts", "staging_ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == torch.int32
    assert found.page_tokens == 4


@pytest.mark.parametrize(
    ("indptr", "indices", "last", "message"),
    [
        ([0, 2], [1, 2, 3], [4], r"indptr must end with the length of indices \(3\), got 2"),
        ([1, 2], [1, 2], [4], "indptr must begin with 0, got 1"),
        ([0, 2, 1], [1], [4, 4], "indptr must not decrease"),
        ([0, 2], [1, 2], [5], r"last_page_len\[0\] must be 1 to page_tokens \(4\), got 5"),
        ([0, 0, 2], [1, 2], [0, 0], r"last_page_len\[1\] must be 1 to page_tokens"),
        ([0, 2, 2], [1, 2], [4], r"one element more than last_page_len \(1\), got 3"),
        ([0, 2], [1, 10], [4], "indices holds the page id 10"),
        ([0, 2], [1, -1], [4], "indices holds the page id -1"),
    ],
)
def test_lists_that_contradict_each_other(
    indptr: list[int], indices: list[int], last: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        flashcore.layout_from_csr(
            *map(torch.tensor, (indptr, indices, last)), page_tokens=4, num_pages=10
        )
