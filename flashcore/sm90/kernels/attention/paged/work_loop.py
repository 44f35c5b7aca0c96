"""The persistent loop over a plan's work list, and what the producer publishes of an item."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from flashcore.contract.work import FIELDS

SLOT_WORDS = 16


class Slot(NamedTuple):
    """Shared memory through which the producer publishes an item."""

    words: cute.Tensor
    full: cute.Pointer
    empty: cute.Pointer


class Item(NamedTuple):
    """A work item with the tiles of its run that some row sees.

    Tiles first .. end - 1 hold a visible key (none: end <= first); of these, full_low .. full_high
    - 1 need no mask but for the run's end. Keys low .. high - 1 are visible to some row.
    """

    valid: Int32  # -1 after the last item
    kv_head: Int32
    row_begin: Int32
    num_rows: Int32
    kv_offset: Int32
    num_tokens: Int32
    partial: Int32
    first: Int32
    end: Int32
    full_low: Int32
    full_high: Int32
    low: Int32
    high: Int32
    entry: Int32  # first entry of the run
    # With a window alone. Every row sees keys all_low .. all_high - 1, whatever the tree mask says.
    all_low: Int32 | None = None
    all_high: Int32 | None = None


@cute.jit
def work_row(mWork: cute.Tensor, index: Int32):
    """A row of the work list."""
    words = cute.make_rmem_tensor(FIELDS, Int32)
    read_row(mWork, index, words)
    return words


@cute.jit
def read_row(mWork: cute.Tensor, index: Int32, words: cute.Tensor):
    """Read a row of the work list into `words` in two 16-byte loads."""
    row = cute.make_tensor((mWork.iterator + index * FIELDS).align(16), cute.make_layout(FIELDS))
    cute.autovec_copy(row, words)


@cute.jit
def publish_item(slot: Slot, phase: Int32, item: Item):
    """Write an item once every consumer warp has read the last one."""
    cute.arch.mbarrier_wait(slot.empty, phase)
    if cute.arch.lane_idx() == 0:
        for i in cutlass.range_constexpr(len(item)):
            if const_expr(item[i] is not None):
                slot.words[i] = item[i]
        cute.arch.mbarrier_arrive(slot.full)


@cute.jit
def publish_end(slot: Slot, phase: Int32):
    """Tell everyone who awaits items that there are no more."""
    nothing = Int32(0)
    needed = len(Item._fields) - len(Item._field_defaults)
    publish_item(slot, phase, Item(Int32(-1), *[nothing] * (needed - 1)))


@cute.jit
def await_item(slot: Slot, phase: Int32) -> Item:
    """The next published item, its slot freed; `valid` is -1 after the last."""
    cute.arch.mbarrier_wait(slot.full, phase)
    words = [slot.words[i] for i in range(len(Item._fields))]
    # Every lane has read and every lane arrives, which needs no order between them.
    cute.arch.mbarrier_arrive(slot.empty)
    return Item(*words)
