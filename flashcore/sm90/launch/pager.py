"""Launch the pager's kernels on torch tensors.

Four launches on torch's current stream, six for a token map, nothing read back, so a call can be
captured in a CUDA graph once the kernel is loaded. Arguments are taken as already checked
(`pager.device`).
"""

from __future__ import annotations

import torch

from flashcore.jit.cache import shared_cache
from flashcore.jit.kernel import Kernel
from flashcore.jit.load import CompiledFunction
from flashcore.sm90.available import sm_count
from flashcore.sm90.config.pager import PagerConfig
from flashcore.sm90.families import PAGER

_functions: dict[PagerConfig, CompiledFunction] = {}


def make_layout(
    config: PagerConfig,
    batch: tuple[torch.Tensor | None, ...],
    layout: tuple[torch.Tensor, ...],
    scratch: tuple[torch.Tensor, ...],
    page_tokens: int,
    num_pages: int,
) -> None:
    """Fill `layout`; the tuples are `Batch`, `Layout` and `Scratch` of `kernels.pager`."""
    found = _functions.get(config)
    if found is None:
        found = _functions[config] = shared_cache().function(Kernel(PAGER, config))
    found(*batch, layout, scratch, page_tokens, num_pages, sm_count(layout[0].device))
