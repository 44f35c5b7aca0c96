"""The merge of default plans, by the text of its kernel on the host."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from flashcore.sm90.config.merge import MergeConfig
from tests.emulation.chunked_attention import merge_partials
from tests.emulation.simt import Memory

LENGTHS = [1, 2, 3, 4, 5, 7, 31, 33, 70]
HEADS, DIM = 2, 64


@pytest.mark.parametrize("worst", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("heads", "on_device"), [(1, False), (8, True)])
def test_what_is_not_finite_stays_what_it_is(heads: int, on_device: bool, worst: float) -> None:
    """In the last entry of each list, which is read again in place of those past it."""
    generator = torch.Generator().manual_seed(3)
    count = sum(LENGTHS)
    partial_out = torch.randn(count, HEADS, DIM, generator=generator)
    partial_lse = torch.randn(count, HEADS, generator=generator)
    ends = torch.tensor(LENGTHS).cumsum(0)
    partial_out[ends - 1, 1, 5] = worst
    shape = (len(LENGTHS), HEADS)
    out, lse = np.zeros((*shape, DIM), np.float32), np.zeros(shape, np.float32)
    m = {"out": out, "lse": lse, "partial_out": partial_out, "partial_lse": partial_lse}
    tensors: Any = mock.Mock(
        spec_set=list(m), **{name: Memory.of(np.asarray(x)) for name, x in m.items()}
    )
    plan: Any = mock.Mock(
        merge_offsets=torch.tensor([0, *ends], dtype=torch.int32),
        merge_partials=torch.arange(count, dtype=torch.int32),
    )
    merge_partials(plan, tensors, MergeConfig("bf16", DIM, False, 1, heads, on_device), shape)
    for token, (end, length) in enumerate(zip(ends.tolist(), LENGTHS, strict=True)):
        own = slice(end - length, end)
        weights = torch.softmax(partial_lse[own].double(), 0)[..., None]
        expected = (weights * partial_out[own].double()).sum(0).float().bfloat16().float().numpy()
        np.testing.assert_allclose(out[token], expected, rtol=0.01, atol=1e-6)
        total = torch.logsumexp(partial_lse[own], 0).numpy()
        np.testing.assert_allclose(lse[token], total, rtol=1e-5, atol=1e-5)
