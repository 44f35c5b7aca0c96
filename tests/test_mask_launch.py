"""What a launch makes of masks: positions of drafts, what a window leaves of a tree mask, strided
sinks and masks, bounds near the end of the integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import flashcore
from flashcore.contract.counts import Count
from flashcore.sm90.families import PAGED
from flashcore.sm90.launch import paged as launch_paged
from flashcore.tree import by_depth
from tests.mask_cases import strided
from tests.pretend_gpu import no_gpu
from tests.runtime_fixtures import needs_dsl
from tests.test_runtime_launch_paged import (  # noqa: F401
    DIM,
    HEADS,
    KV_HEADS,
    PAGE,
    CheckedPaged,
    Recorder,
    recorder,
)

Q_INDEX, TREE, POSITIONS, SINKS = 11, 12, 13, 14  # places among the kernel's arguments


def verify(q_lens: list[int]) -> dict[str, Any]:
    """Sequences of 300 tokens with so many drafts each."""
    table = torch.arange(5 * len(q_lens)).view(len(q_lens), 5).int()
    lengths = torch.full((len(q_lens),), 300)
    plan = flashcore.plan(
        flashcore.layout_from_page_table(table, lengths, page_tokens=PAGE),
        q_lens=q_lens,
        num_q_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        page_tokens=PAGE,
    )
    pages = torch.zeros(table.numel(), PAGE, KV_HEADS, DIM, dtype=torch.bfloat16)
    q = torch.zeros(sum(q_lens), HEADS, DIM, dtype=torch.bfloat16)
    return {"q": q, "k_pages": pages, "v_pages": pages.clone(), "plan": plan}


#     0        0
#    1 2       1
#   3   4      2
MASK = torch.tensor(
    [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1],
        [1, 0, 0, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 1, 1],
    ]
).bool()  # fmt: skip


def paged_calls(recorder: Recorder) -> list[tuple[Any, ...]]:  # noqa: F811
    return [arguments for name, arguments in recorder.calls if name == "paged"]


def test_drafts_stand_where_the_mask_says(recorder: Recorder) -> None:  # noqa: F811
    flashcore.paged_attention(**verify([5, 3]), tree_mask=MASK, window=(127, 0))
    (call,) = paged_calls(recorder)
    assert call[POSITIONS].tolist() == [1, 2, 2, 3, 3, 1, 2, 3]
    assert call[POSITIONS].dtype == torch.int32
    assert torch.equal(call[TREE], MASK.view(torch.uint8))
    assert call[-3:-1] == (127, -1)


def test_positions_that_are_given_are_passed_as_they_are(recorder: Recorder) -> None:  # noqa: F811
    positions = torch.tensor([295, 296, 296, 297, 297, 297, 298, 299]).int()
    given = verify([5, 3])
    for _ in range(2):
        flashcore.paged_attention(
            **given, tree_mask=MASK, tree_positions=positions, window=(127, 0)
        )
    assert [call[POSITIONS] is positions for call in paged_calls(recorder)] == [True, True]


def test_a_short_window_leaves_less_of_the_mask(recorder: Recorder) -> None:  # noqa: F811
    flashcore.paged_attention(**verify([5, 3]), tree_mask=MASK, window=(1, 0))
    expected = MASK.clone()
    expected[3:5, 0] = False
    expected[7, 0] = False
    expected[5:, 3:] = paged_calls(recorder)[0][TREE][5:, 3:].bool()  # no tokens of the sequence
    assert torch.equal(paged_calls(recorder)[0][TREE].bool(), expected)


def test_without_a_window_nothing_is_added(recorder: Recorder) -> None:  # noqa: F811
    given, positions = verify([5, 3]), torch.arange(8).int()
    for window in (None, (-1, -1), (-1, 0), (2**31 - 1, 0)):
        flashcore.paged_attention(
            **given, tree_mask=MASK, tree_positions=positions % 5, window=window
        )
        call = paged_calls(recorder)[-1]
        assert call[POSITIONS] is None
        assert call[TREE].data_ptr() == MASK.data_ptr()
    assert not any(k.config.window for k in recorder.kernels if k.family is PAGED)


def test_what_stands_past_a_device_plan_s_tokens_has_no_say() -> None:
    """Its tensors are at capacity: q_index holds what larger batches left there."""
    q_index = torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 3, 9])
    counts = torch.zeros(Count.SIZE, dtype=torch.int32)
    counts[Count.TOTAL_Q] = 8
    mask = torch.cat([MASK, torch.ones(7, 5).bool()])
    for rows in (8, 12, 15):  # fewer and more than the plan has room for
        left, positions = by_depth(mask[:rows], None, q_index, counts[Count.TOTAL_Q], 127)
        assert positions[:8].tolist() == [1, 2, 2, 3, 3, 1, 2, 3]
        assert torch.equal(left, mask[:rows])
        left, _ = by_depth(mask[:rows], None, q_index, counts[Count.TOTAL_Q], 1)
        assert left[:8].sum(1).tolist()[:5] == [1, 2, 2, 2, 2]


def test_sinks_in_any_strides_reach_the_paged_kernel(recorder: Recorder) -> None:  # noqa: F811
    given = verify([1, 1])
    for sinks in strided(torch.randn(HEADS)):
        for _ in range(2):
            flashcore.paged_attention(**given, sinks=sinks)
            passed = paged_calls(recorder)[-1][SINKS]
            assert (passed.stride(), passed.dtype) == ((1,), torch.float32)
            assert torch.equal(passed, sinks.float())


def test_masks_in_any_strides_reach_the_kernel(recorder: Recorder) -> None:  # noqa: F811
    given = verify([5, 3])
    wide = torch.zeros(8, 10).bool()
    wide[:, ::2] = MASK
    for mask in (MASK.T.contiguous().T, wide[:, ::2], MASK):
        for window in (None, (1, 0), (127, 0)):
            flashcore.paged_attention(**given, tree_mask=MASK, window=window)
            expected = paged_calls(recorder)[-1][TREE]
            flashcore.paged_attention(**given, tree_mask=mask, window=window)
            passed = paged_calls(recorder)[-1][TREE]
            assert passed.stride() == (5, 1)
            assert torch.equal(passed, expected)


@needs_dsl
@no_gpu
def test_compiled_function_takes_what_the_launch_passes(
    recorder: Recorder,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It checks its arguments before it asks for a driver, which is not there."""
    checked = CheckedPaged()
    monkeypatch.setattr(launch_paged, "shared_cache", lambda: checked)
    scratch = torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(launch_paged, "scheduler_scratch", lambda index: scratch)
    given, positions = verify([5, 3]), torch.arange(16).int()[::2] % 10 // 2
    for sinks in strided(torch.randn(HEADS)):
        for mask in (MASK, MASK.T.contiguous().T):
            for extra in ({}, {"tree_positions": positions}):
                with pytest.raises(RuntimeError, match="InsufficientDriver"):
                    flashcore.paged_attention(
                        **given, sinks=sinks, tree_mask=mask, window=(127, 0), **extra
                    )
    with pytest.raises(TypeError, match="tree_positions must have dtype int32"):
        flashcore.paged_attention(
            **given, tree_mask=MASK, window=(127, 0), tree_positions=positions.long()
        )
