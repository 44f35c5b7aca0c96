"""Which implementation serves a device, and why; decided once per device.

A provider is a module with functions `available(device)`, (whether it serves the device, the reason
in words), and `resident_ctas(device, head_dim, tile_m, v_head_dim)`, the work items that run at
once. It is imported when a device of its kind is first met.
"""

from __future__ import annotations

import warnings
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch

PROVIDERS = {"hopper": "flashcore.sm90.available"}
"""By path: modules that serve CUDA devices, in the order in which they are asked."""


class Path(NamedTuple):
    """name: one of PROVIDERS (our kernels) or "eager" (torch operators on the same plan). reason:
    why."""

    name: str
    reason: str


@cache
def device_path(device: torch.device) -> Path:
    """Path of attention on a device; the first look at a GPU that gets no kernels warns."""
    path = _find(device)
    if device.type == "cuda" and path.name not in PROVIDERS:
        warnings.warn(
            f"flashcore runs torch operators on {device}, not its Hopper kernels: {path.reason}",
            RuntimeWarning,
            stacklevel=4,
        )
    return path


def resident_ctas(
    device: torch.device, head_dim: int, tile_m: int, v_head_dim: int | None = None
) -> int:
    """CTAs of paged attention that a CUDA device runs at once: what a plan's splits are for. Of one
    that no provider serves, as many as the first would run."""
    name = _find(device).name
    provider = _provider(name if name in PROVIDERS else next(iter(PROVIDERS)))
    return int(provider.resident_ctas(device, head_dim, tile_m, v_head_dim))


@cache
def _find(device: torch.device) -> Path:
    if device.type != "cuda":
        return Path("eager", f"{device.type} runs torch operators")
    reasons = []
    for name in PROVIDERS:
        usable, reason = _provider(name).available(device)
        if usable:
            return Path(name, reason)
        reasons.append(reason)
    return Path("eager", "; ".join(reasons))


def _provider(name: str) -> Any:
    return import_module(PROVIDERS[name])
