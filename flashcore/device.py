"""Which path a device takes, and why; decided once per device. A GPU on the slow one is told."""

from __future__ import annotations

import warnings
from functools import cache
from typing import NamedTuple

import torch


class Path(NamedTuple):
    """name: "hopper" (our kernels) or "eager" (torch operators on the same plan). reason: why."""

    name: str
    reason: str


@cache
def device_path(device: torch.device) -> Path:
    """Path of attention on a device; the first look at a GPU that gets no kernels warns."""
    if device.type != "cuda":
        return Path("eager", f"{device.type} runs torch operators")
    from flashcore.runtime.launch import available

    usable, reason = available(device)
    if usable:
        return Path("hopper", reason)
    warnings.warn(
        f"flashcore runs torch operators on {device}, not its Hopper kernels: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )
    return Path("eager", reason)


def resident_ctas(
    device: torch.device, head_dim: int, tile_m: int, v_head_dim: int | None = None
) -> int:
    """CTAs of the paged kernel that a CUDA device runs at once: what a plan's splits are for."""
    from flashcore.config.paged import ctas_per_sm

    sms = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return sms * ctas_per_sm(head_dim, tile_m, v_head_dim)
