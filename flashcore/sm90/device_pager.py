"""The pager on the GPU: fixed capacities, made by kernels alone, fit for CUDA graphs.

The host waits for nothing: what there is of each list is counted in `DeviceLayout.counts`, on the
device. A sequence that cannot be laid out (a page id out of range, a range outside the map, no
room) is marked in `DeviceLayout.bad`, and its pages are not staged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashcore import validate
from flashcore.contract.counts import Fault, PagerCount
from flashcore.contract.operands import Pager, PagerMemory, PagerResult, PlannerSource
from flashcore.contract.scratch import FREE, SCAN_THREADS
from flashcore.contract.scratch import PagerRanges as Ranges
from flashcore.contract.scratch import PagerTiles as Tiles
from flashcore.dispatch import device_path
from flashcore.names import known
from flashcore.pager.csr import Layout
from flashcore.sm90.available import sm_count
from flashcore.sm90.config.pager import PagerConfig


@dataclass(frozen=True, eq=False)
class DeviceLayout:
    """Tensors of `flashcore.Layout` at capacity, int32; an update rewrites them where they are.

    A `DevicePager` makes it, never its constructor, and owns it.

    counts: [PagerCount.SIZE] how much of each tensor is filled, and `Fault` bits of the batch.
    bad: [max_batch] `Fault` bits of each sequence.
    kv_lens: [max_batch] tokens of each sequence.
    starts, rows: [max_entries] for each entry, the tokens of its sequence before it, and the
        sequence.
    """

    page_tokens: int
    num_pages: int
    counts: torch.Tensor
    bad: torch.Tensor
    row_offsets: torch.Tensor
    kv_lens: torch.Tensor
    cols: torch.Tensor
    token_counts: torch.Tensor
    starts: torch.Tensor
    rows: torch.Tensor
    staging_ids: torch.Tensor

    def faults(self) -> Fault:
        """What was wrong with any sequence of the last update. Waits for the device."""
        return Fault(int(self.counts[PagerCount.FAULTS]))

    def source(self) -> PlannerSource:
        """What the planner's kernels read of it."""
        return PlannerSource(*(getattr(self, name) for name in PlannerSource._fields))

    def trimmed(self) -> Layout:
        """The last update as a `Layout` of its own. Waits for the device."""
        n = self.counts.tolist()
        nnz = n[PagerCount.NNZ]
        return Layout(
            self.row_offsets[: n[PagerCount.BATCH] + 1].clone(),
            self.cols[:nnz].clone(),
            self.token_counts[:nnz].clone(),
            self.staging_ids[: n[PagerCount.STAGED]].clone(),
            self.page_tokens,
        )


class DevicePager:
    """Lays out batches on one GPU, into one `DeviceLayout` that it owns, and launches only.

    Args:
        max_batch, max_entries: sequences, and pages of all sequences together, that there may be.
        max_tokens: longest token map; 0 where only page tables come.
        num_pages: size of the page pool; ids outside it are caught.
        page_tokens: tokens that a page holds.
        device: a Hopper GPU.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it may be.
    """

    @known
    def __init__(
        self,
        *,
        max_batch: int,
        max_entries: int,
        num_pages: int,
        max_tokens: int = 0,
        page_tokens: int = 128,
        device: torch.device | str = "cuda",
    ):
        most = validate.INT32_MAX
        validate.positive_int("max_batch", max_batch, maximum=most)
        validate.positive_int("max_entries", max_entries, maximum=most - 1)
        if max_tokens != 0 or isinstance(max_tokens, bool):
            validate.positive_int("max_tokens", max_tokens, maximum=most - 1)
        validate.positive_int("num_pages", num_pages, maximum=most)
        validate.positive_int("page_tokens", page_tokens)
        device = validate.device("device", device)
        if max_batch * (max_entries + 1) > most:
            raise ValueError(
                f"max_batch x (max_entries + 1) must be below 2**31, got {max_batch} x "
                f"{max_entries + 1}"
            )

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.max_tokens = max_tokens
        self._filled = PagerResult(
            counts=zeros(PagerCount.SIZE),
            bad=zeros(max_batch),
            row_offsets=zeros(max_batch + 1),
            kv_lens=zeros(max_batch),
            cols=zeros(max_entries),
            token_counts=zeros(max_entries),
            starts=zeros(max_entries),
            rows=zeros(max_entries),
            staging_ids=zeros(max_entries),
        )
        self.layout = DeviceLayout(page_tokens, num_pages, **self._filled._asdict())
        self._scratch = PagerMemory(
            changes=zeros(max(max_tokens, 1)),
            pieces=zeros(max(max_tokens, 1)),
            ranges=zeros(Ranges.LINES, max_batch),
            slots=torch.full((num_pages,), FREE, dtype=torch.long, device=device),
            tiles=zeros(Tiles.LINES, SCAN_THREADS, dtype=torch.long),
        )

    def update(
        self,
        token_to_page: torch.Tensor,
        seq_starts: torch.Tensor,
        seq_ends: torch.Tensor,
        page_resident_bitmap: torch.Tensor | None = None,
    ) -> DeviceLayout:
        """`flashcore.build_layout` on the current stream; arguments as there, but int32 and
        contiguous. The first call may compile."""
        int32 = (torch.int32,)
        validate.tensor("token_to_page", token_to_page, dtypes=int32, ndim=1)
        validate.tensor("seq_starts", seq_starts, dtypes=int32, ndim=1)
        validate.tensor("seq_ends", seq_ends, dtypes=int32, ndim=1)
        if token_to_page.numel() > self.max_tokens:
            raise ValueError(
                f"token_to_page has {token_to_page.numel()} tokens, max_tokens is {self.max_tokens}"
            )
        if seq_starts.numel() != seq_ends.numel():
            raise ValueError(
                f"seq_ends must have as many elements as seq_starts ({seq_starts.numel()}), "
                f"got {seq_ends.numel()}"
            )
        for name, value in (
            ("token_to_page", token_to_page),
            ("seq_starts", seq_starts),
            ("seq_ends", seq_ends),
        ):
            if not value.is_contiguous():
                raise ValueError(f"{name} must be contiguous, got stride {value.stride(0)}")
        return self._launch(True, token_to_page, seq_starts, seq_ends, page_resident_bitmap)

    def update_from_page_table(
        self,
        page_table: torch.Tensor,
        seq_lens: torch.Tensor,
        page_resident_bitmap: torch.Tensor | None = None,
    ) -> DeviceLayout:
        """`flashcore.layout_from_page_table` on the current stream; arguments as there, but int32,
        rows and lengths contiguous."""
        validate.tensor("page_table", page_table, dtypes=(torch.int32,), ndim=2)
        validate.tensor("seq_lens", seq_lens, dtypes=(torch.int32,), ndim=1)
        if page_table.shape[0] != seq_lens.numel():
            raise ValueError(
                f"seq_lens must have one length per row of page_table ({page_table.shape[0]}), "
                f"got {seq_lens.numel()}"
            )
        if page_table.numel() == 0:  # torch gives empty tensors any strides
            page_table = page_table.new_empty(page_table.shape)
        elif page_table.stride(1) != 1:
            raise ValueError(
                f"page_table must have contiguous rows, got strides {page_table.stride()}"
            )
        return self._launch(False, page_table, None, seq_lens, page_resident_bitmap)

    def _launch(
        self,
        tokens: bool,
        pages: torch.Tensor,
        begins: torch.Tensor | None,
        ends: torch.Tensor,
        resident: torch.Tensor | None,
    ) -> DeviceLayout:
        layout = self.layout
        if ends.numel() > layout.bad.numel():
            name = "seq_ends" if tokens else "seq_lens"
            raise ValueError(
                f"{name} has {ends.numel()} sequences, max_batch is {layout.bad.numel()}"
            )
        validate.same_device(
            "the pager",
            layout.cols,
            **{"token_to_page" if tokens else "page_table": pages},
            seq_starts=begins,
            **{"seq_ends" if tokens else "seq_lens": ends},
            page_resident_bitmap=resident,
        )
        if tokens:
            pages = unit_stride(pages)
        begins = None if begins is None else unit_stride(begins)
        ends = unit_stride(ends)
        config = PagerConfig(tokens, self._bitmap(resident))
        if resident is not None and resident.dtype == torch.bool:
            resident = resident.view(torch.uint8)
        path = device_path(layout.cols.device)
        if path.name != "hopper":
            raise NotImplementedError(
                f"DevicePager runs Hopper kernels: {path.reason}; use flashcore.build_layout"
            )
        from flashcore.sm90.launch.pager import make_layout

        operands = Pager(
            pages=pages,
            begins=begins,
            ends=ends,
            resident=resident,
            layout=self._filled,
            scratch=self._scratch,
            page_tokens=layout.page_tokens,
            num_pages=layout.num_pages,
            num_sms=sm_count(layout.cols.device),
        )
        make_layout(config, operands)
        return layout

    def _bitmap(self, resident: torch.Tensor | None) -> str:
        """The kind of a bitmap that covers the pool, one of `sm90.config.pager.BITMAPS`."""
        if resident is None:
            return "none"
        dtypes = (torch.bool, torch.uint8, torch.int32)
        validate.tensor("page_resident_bitmap", resident, dtypes=dtypes, ndim=1)
        words = resident.dtype == torch.int32
        held = resident.numel() * (32 if words else 1)
        if held < self.layout.num_pages or not resident.is_contiguous():
            raise ValueError(
                f"page_resident_bitmap must be contiguous and cover num_pages = "
                f"{self.layout.num_pages} pages, it covers {held}"
            )
        return "words" if words else "bytes"


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """A contiguous vector with a stride of 1: torch gives those of 0 or 1 elements any."""
    return x if x.numel() > 1 else x.as_strided(x.shape, (1,))
