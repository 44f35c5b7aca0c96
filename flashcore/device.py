"""Which path a device takes, and why; decided once per device. A GPU on the slow one is warned of."""

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
def dense_path(device: torch.device) -> Path:
    """Path of `flashcore.attention` on a device."""
    if device.type != "cuda":
        return Path("eager", f"{device.type} runs torch operators")
    from flashcore.runtime.launch import available

    usable, reason = available(device)
    return Path("hopper", reason) if usable else _slow(Path("eager", reason), device)


@cache
def paged_path(device: torch.device) -> Path:
    """Path of `flashcore.paged_attention` on a device."""
    if device.type != "cuda":
        return Path("eager", f"{device.type} runs torch operators")
    return _slow(Path("eager", "this version has no paged kernel"), device)


def _slow(path: Path, device: torch.device) -> Path:
    warnings.warn(
        f"flashcore runs torch operators on {device}, not its Hopper kernels: {path.reason}",
        RuntimeWarning,
        stacklevel=4,
    )
    return path
