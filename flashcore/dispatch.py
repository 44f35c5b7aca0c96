"""Which implementation serves a device, and why; decided once per device.

A provider is a module with functions `available(device)`, (whether it serves the device, the reason
in words), and `resident_ctas(device, head_dim, tile_m, v_head_dim)`, the work items that run at
once. It is imported when a device of its kind is first met.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch

PROVIDERS = {"hopper": "flashcore.sm90.available"}
"""By path: modules that serve CUDA devices, in the order in which they are asked."""

Impl = Literal["auto", "eager"]
IMPLS = ("auto", "eager")
VARIABLE = "FLASHCORE_IMPL"


class Path(NamedTuple):
    """name: one of PROVIDERS (our kernels), "eager" (torch operators on the same plan), or "none"
    where torch operators would be far slower than the device and are not taken unless asked for.
    reason: why."""

    name: str
    reason: str


@cache
def device_path(device: torch.device) -> Path:
    """Path of attention on a device where the caller does not choose."""
    if device.type != "cuda":
        return Path("eager", f"{device.type} runs torch operators")
    reasons = []
    for name in PROVIDERS:
        usable, reason = _provider(name).available(device)
        if usable:
            return Path(name, reason)
        reasons.append(reason)
    return Path("none", "; ".join(reasons))


def wanted(impl: str | None) -> str:
    """One of IMPLS: what a call names, else what the program's environment does."""
    if impl is None:
        return _wanted_by_program()
    if impl not in IMPLS:
        raise ValueError(f"impl must be {_choices()}, got {impl!r}")
    return impl


@cache
def _wanted_by_program() -> str:
    """Read once: launches that calls have made ready must not outlive the choice."""
    value = os.environ.get(VARIABLE) or "auto"
    if value not in IMPLS:
        raise ValueError(f"the environment variable {VARIABLE} must be {_choices()}, got {value!r}")
    return value


def _choices() -> str:
    return " or ".join(map(repr, IMPLS))


def no_kernels(device: torch.device, reason: str) -> NotImplementedError:
    """The error of a call that nothing serves, with the ways out."""
    return NotImplementedError(
        f"flashcore has no kernels for {device}: {reason}. Torch operators run there if asked for, "
        f"far more slowly: pass impl='eager', or set {VARIABLE}=eager for the whole program"
    )


def resident_ctas(
    device: torch.device, head_dim: int, tile_m: int, v_head_dim: int | None = None
) -> int:
    """CTAs of paged attention that a CUDA device runs at once: what a plan's splits are for. Of one
    that no provider serves, as many as the first would run."""
    name = device_path(device).name
    provider = _provider(name if name in PROVIDERS else next(iter(PROVIDERS)))
    return int(provider.resident_ctas(device, head_dim, tile_m, v_head_dim))


def _provider(name: str) -> Any:
    return import_module(PROVIDERS[name])
