"""Which devices run the Hopper kernels, and what the others are told."""

from __future__ import annotations

import pytest
import torch

from flashcore.sm90 import available


def test_cpu_is_not_available() -> None:
    assert available.available("cpu") == (False, "cpu is not a CUDA device")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message for a machine without a GPU")
def test_no_gpu_is_not_available() -> None:
    assert available.available("cuda") == (False, "torch sees no CUDA device")


@pytest.mark.parametrize("capability", [(8, 0), (9, 1), (10, 0)])
def test_other_gpus_are_not_available(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    usable, reason = available._available.__wrapped__(0)
    assert not usable
    assert f"Some GPU has compute capability {capability[0]}.{capability[1]}" in reason
