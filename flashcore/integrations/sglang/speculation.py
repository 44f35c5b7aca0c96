"""Tree masks of speculative decoding: the one that SGLang's worker fills, and the one layers read.

    worker's drafts ─► draft mask (flat, SGLang's) ─► tree mask [tokens, drafts] ─► every layer

SGLang may take a batch into a graph's buffers before its drafts are made (the overlap plan stream
of 0.5.16): then it says when the draft mask is final, and the tree mask is written again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from flashcore.serving import page_tables
from flashcore.serving.shapes import Model


@dataclass(frozen=True, eq=False)
class _Taken:
    """Where the tree mask of a batch comes from, and where it goes.

    tree: [tokens, draft_tokens]. positions: int32 [tokens], where each token stands in its tree;
    None where no layer has a window, which counts from there.
    """

    tree: torch.Tensor
    positions: torch.Tensor | None
    mask: torch.Tensor
    seq_lens: torch.Tensor
    real: int
    draft_tokens: int


class TreeMasks:
    """Masks of one backend's verify forwards."""

    def __init__(self, model: Model, max_context_len: int, max_batch: int, is_draft: bool):
        """max_batch: requests that run at most. is_draft: of a draft model, which verifies none."""
        self.model, self.max_context_len = model, max_context_len
        self.max_batch, self.is_draft = max_batch, is_draft
        self.verify_mask: Any = None  # as SGLang 0.5.23 asks for it
        self.draft_mask: torch.Tensor | None = None  # as 0.5.16 does; the same memory
        self._of_drafts = False  # the draft mask is over the draft tokens alone, not over all keys
        self._buffer: torch.Tensor | None = None  # of captured graphs
        self._positions_buffer: torch.Tensor | None = None  # of captured graphs
        self._taken: _Taken | None = None

    @property
    def bytes(self) -> int:
        """Memory that it keeps."""
        kept = (self.draft_mask, self._buffer, self._positions_buffer)
        return sum(x.nbytes for x in kept if x is not None)

    def allocate(self, max_bs: int, max_num_tokens: int) -> None:
        """Buffers of graphs up to `max_bs` sequences."""
        n, device = self.model.draft_tokens, self.model.device
        if not n:
            return
        self._buffer = torch.ones(max_num_tokens, n, dtype=torch.bool, device=device)
        if self.model.windowed is not None:
            self._positions_buffer = torch.ones(max_num_tokens, dtype=torch.int32, device=device)
        if self.is_draft:
            return
        verify_mask = _verify_mask_type()
        if verify_mask is not None:
            mask_type, mode = verify_mask
            self._of_drafts = True
            self.draft_mask = torch.zeros(max_bs * n * n, dtype=torch.bool, device=device)
            self.verify_mask = mask_type(
                buffer=self.draft_mask, mode=mode, max_bs=max_bs, is_read=True
            )
        elif max_bs >= self.max_batch:
            # 0.5.16 writes masks over all keys, of any batch that runs: what does not fit is lost.
            # Where larger batches can run its worker allocates a mask for each.
            elements = max_num_tokens * (self.max_context_len + n)
            self.draft_mask = torch.zeros(elements, dtype=torch.bool, device=device)

    def take(
        self, fb: Any, real: int, queries: int, graph: bool, in_capture: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The tree mask [queries, draft_tokens] of a forward, and where its tokens stand in their
        trees (int32 [queries], where a layer has a window); None where it is no tree's.

        real: sequences that are; rows of others see themselves.
        """
        self._taken = None
        spec = fb.spec_info
        if not is_tree(fb):
            return None, None
        n = int(spec.draft_token_num)
        if graph:
            assert self._buffer is not None
            tree, positions = self._buffer[:queries], self._positions_buffer
            positions = None if positions is None else positions[:queries]
            if in_capture:
                return tree, positions  # there is no mask yet
        else:
            tree = torch.empty(queries, n, dtype=torch.bool, device=self.model.device)
            positions = None
            if self.model.windowed is not None:
                positions = torch.empty(queries, dtype=torch.int32, device=self.model.device)
        taken = _Taken(tree, positions, spec.custom_mask, fb.seq_lens, real, n)
        self._write(taken)
        self._taken = taken if graph else None
        return tree, positions

    def refresh(self, spec_info: Any) -> None:
        """The draft mask is final: write the tree mask of the graph's batch again."""
        taken = self._taken
        if taken is None:
            return
        mask = getattr(spec_info, "custom_mask", None)
        mask = taken.mask if mask is None else mask
        self._write(replace(taken, mask=mask))

    def _write(self, taken: _Taken) -> None:
        n, mask, real = taken.draft_tokens, taken.mask, taken.real
        own = self.draft_mask is not None and mask.data_ptr() == self.draft_mask.data_ptr()
        full = not (own and self._of_drafts) and mask.numel() != real * n * n
        page_tables.tree_mask(taken.tree, mask, taken.seq_lens[:real], n, full)
        if taken.positions is not None:  # rows hold all ancestors and the token itself
            torch.sum(taken.tree, 1, dtype=torch.int32, out=taken.positions)


def is_tree(fb: Any) -> bool:
    """Drafts that are no chain. EAGLE says how wide its tree is; n-gram drafts are always trees."""
    spec = fb.spec_info
    if not fb.forward_mode.is_target_verify() or getattr(spec, "custom_mask", None) is None:
        return False
    return getattr(spec, "topk", 0) != 1


def drafts_are_trees(runner: Any) -> bool:
    """Whether verify forwards of a server have tree masks."""
    try:
        from sglang.srt.runtime_context import get_spec

        options = get_spec()
    except ImportError:  # 0.5.16
        options = runner.server_args
    algorithm = str(getattr(options, "speculative_algorithm", None)).upper()
    return (getattr(options, "speculative_eagle_topk", None) or 0) > 1 or algorithm == "NGRAM"


def sequences_of_mask(numel: int, lengths: list[int], draft_tokens: int) -> int:
    """Sequences that a draft mask of `numel` elements is for, of those with `lengths` keys before
    their drafts: the batch may be padded past it."""
    n = draft_tokens
    real = len(lengths)
    if numel == real * n * n:
        return real
    keys = sum(lengths)
    while real and n * (keys + n * real) > numel:
        real -= 1
        keys -= lengths[real]
    of_drafts = numel < n * (sum(lengths) + n * len(lengths)) and numel % (n * n) == 0
    if of_drafts and n * (keys + n * real) != numel:
        return min(len(lengths), numel // (n * n))
    return real


def _verify_mask_type() -> tuple[Any, Any] | None:
    """SGLang 0.5.23's struct of a mask, and the layout over the draft tokens alone."""
    try:
        from sglang.srt.layers.attention.verify_mask import VerifyMask
    except ImportError:  # 0.5.16
        return None
    from sglang.srt.speculative.eagle_utils import TreeMaskMode

    return VerifyMask, TreeMaskMode.QLEN_ONLY
