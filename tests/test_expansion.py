"""Expansion of fp8 pages: the rule of costs, the distinct pages and their places, the bound."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings

import flashcore
from flashcore.contract.work import Group
from flashcore.planner import expansion
from flashcore.planner.expansion import Expansion, Reads, Way, is_worth
from flashcore.problem import Problem, Rules
from tests.cases import Batch, batches

PROBLEM = Problem(32, 8, 128, 128, page_tokens=128, itemsize=1)
RULES = Rules(1.0, causal=True)


def long_prefill(queries: int, tokens: int, *, batch: int = 1, shared: int = 0, **options):
    """Sequences of `tokens`, the first `shared` in common, with so many new ones each; 32/8 heads
    of 128, pages of 128."""
    pages, common = tokens // 128, shared // 128
    own = torch.arange(batch * (pages - common)).view(batch, -1) + common
    table = torch.cat([torch.arange(common).expand(batch, -1), own], 1).int()
    layout = flashcore.layout_from_page_table(
        table, torch.full((batch,), tokens, dtype=torch.int32), page_tokens=128
    )
    of_model = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    return flashcore.plan(
        layout, q_lens=[queries] * batch, **of_model, **{"itemsize": 1, "tile_m": 128, **options}
    )


def test_the_rule_in_numbers():
    def worth(blocks: int, tokens: int, tile_m: int = 128) -> bool:
        return is_worth(Reads(blocks * tokens, blocks, tile_m, 4, tokens), PROBLEM)

    # Per element: CONVERT_COST for each block against EXPAND_COST once, LAUNCH_COST aside.
    enough = expansion.EXPAND_COST // expansion.CONVERT_COST + 1
    assert worth(enough, 1 << 20)
    assert not worth(enough - 1, 1 << 20)
    assert worth(2 * enough, 1 << 20, 64), "half the rows convert for half as many"
    assert not worth(enough, 1 << 20, 64)
    # A launch is paid for by 16 KV heads and tokens together.
    assert not worth(enough, 128)
    assert not is_worth(Reads(0, 0, 128, 4, 0), PROBLEM)


def test_a_window_leaves_less_to_convert():
    reads = Reads(64 * 32768, 64, 128, 4, 32768)
    assert reads.under(RULES) == reads
    assert reads.under(RULES._replace(window_left=1 << 20)) == reads
    narrow = reads.under(RULES._replace(window_left=127))
    assert narrow.block_tokens == 64 * (128 + 32), "the window, and the tokens of a block's rows"
    assert is_worth(reads, PROBLEM)
    assert not is_worth(narrow, PROBLEM)
    both = Rules(1.0, window_left=127, window_right=10)
    assert reads.under(both).block_tokens == 64 * (128 + 10 + 32)
    assert reads.under(Rules(1.0, window_left=127)) == reads, "open to the right"


def test_the_way_of_a_plan():
    def way(*sizes: int, **options) -> Way:
        return long_prefill(*sizes, **options).expansion.way

    assert way(2048, 32768) is Way.EXPANDED
    assert way(1, 32768) is Way.CONVERTED
    assert way(64, 32768) is Way.CONVERTED
    assert way(2048, 32768, expand=False) is Way.REFUSED
    assert way(64, 4096, expand=True) is Way.EXPANDED
    assert way(512, 34816, batch=8, shared=32768) is Way.EXPANDED
    # 8 x 32768 tokens of 4 KB, which the bound does not hold; with 30720 of them shared it does.
    assert way(2048, 32768, batch=8) is Way.NO_ROOM
    assert way(2048, 32768, batch=8, shared=30720) is Way.EXPANDED
    assert long_prefill(2048, 32768, itemsize=2).expansion is None


def test_what_is_asked_for_and_cannot_be():
    with pytest.raises(ValueError, match=r"expand=True is for fp8 pages.* itemsize 2"):
        long_prefill(2048, 32768, itemsize=2, expand=True)
    with pytest.raises(ValueError, match=r"2048 distinct pages .* 1073741824 bytes, at most 5368"):
        long_prefill(2048, 32768, batch=8, expand=True)
    with pytest.raises((TypeError, ValueError), match=r"expand must be True or False"):
        long_prefill(2048, 32768, expand="yes")


def test_a_forced_plan_expands_under_any_rules():
    narrow = RULES._replace(window_left=127)
    chosen, forced = (long_prefill(2048, 32768, expand=expand) for expand in (None, True))
    assert chosen.expansion.serves(RULES, 2048)
    assert not chosen.expansion.serves(narrow, 2048)
    assert forced.expansion.serves(narrow, 2048)
    assert not long_prefill(1, 32768).expansion.serves(RULES, 2048)


def test_stats_say_what_and_why():
    stats = long_prefill(2048, 32768).stats()
    assert stats.expansion == "expanded once for each call"
    assert stats.pages_expanded == 256
    assert stats.bytes_expansion() == 256 * 128 * 8 * 256 * 2
    stats = long_prefill(2048, 32768, batch=8).stats()
    assert "more than the scratch may" in stats.expansion
    assert stats.pages_expanded == stats.bytes_expansion() == 0
    assert long_prefill(1, 4096, itemsize=2).stats().expansion == ""


@settings(max_examples=200, deadline=None)
@given(batches())
def test_places_are_those_of_the_pages(batch: Batch):
    """Every entry that a group reads has its page's place; pages are those, each once."""
    plan = batch.plan(itemsize=1, expand=True)
    found = plan.expansion
    read = torch.zeros(plan.cols.numel(), dtype=torch.bool)
    for row in plan.groups.tolist():
        read[row[Group.ENTRY] : row[Group.ENTRY] + row[Group.NUM_ENTRIES]] = True
    if not read.any():
        assert found.way is Way.CONVERTED
        return
    assert found.way is Way.EXPANDED
    assert found.places.pages.tolist() == sorted(set(plan.cols[read].tolist()))
    assert int(found.places.page_count) == found.places.pages.numel()
    assert (
        found.places.cols.dtype
        == found.places.pages.dtype
        == found.places.page_count.dtype
        == torch.int32
    )
    assert torch.equal(found.places.pages[found.places.cols.long()][read], plan.cols[read])
    assert int(found.places.cols.min()) >= 0
    assert int(found.places.cols.max()) < found.places.pages.numel()


def test_what_blocks_read_is_counted_as_a_causal_mask_leaves_it():
    """Exactly where rows fill blocks and a block is one key high; sequences without queries add
    nothing."""
    plan = long_prefill(4096, 4096, batch=2)
    reads = plan.expansion.reads
    assert reads.blocks == 2 * 128
    assert abs(reads.block_tokens - 2 * 128 * 4096 / 2) <= 2 * 128
    assert reads.distinct_tokens == 2 * 4096
    prefix = long_prefill(128, 4096, batch=2, shared=2048, fold=False).expansion.reads
    assert prefix.blocks == 8 + 2 * 4
    assert prefix.block_tokens == 8 * 2048 + 2 * 4 * (1920 + 2048) // 2 + 4


def test_the_plan_goes_to_another_device_with_it():
    moved = long_prefill(2048, 32768).to("meta")
    assert isinstance(moved.expansion, Expansion)
    assert moved.expansion.places.cols.device.type == "meta"
    assert long_prefill(1, 32768).to("meta").expansion.places is None


def test_results_on_the_torch_path_are_the_same():
    q = torch.randn(64, 32, 128).half()
    pools = [torch.randn(4, 128, 8, 128).to(torch.float8_e4m3fn) for _ in range(2)]
    plans = [long_prefill(64, 512, expand=expand) for expand in (True, False)]
    outs = [flashcore.paged_attention(q, *pools, plan) for plan in plans]
    assert torch.equal(*outs)


def test_the_bound_is_of_bytes():
    with mock.patch.object(expansion, "EXPANSION_BYTES", 256 * 128 * 8 * 256 * 2):
        assert long_prefill(2048, 32768).expansion.way is Way.EXPANDED
        assert long_prefill(2048, 32768 + 128).expansion.way is Way.NO_ROOM
    wide = replace(PROBLEM, v_head_dim=64)
    assert expansion.expanded_bytes(3, wide) == 2 * 3 * 128 * 8 * 192
