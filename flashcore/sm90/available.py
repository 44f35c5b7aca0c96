"""Whether a device runs the Hopper kernels, and how much of them at once (see `dispatch`)."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch

from flashcore.jit.folder import default_folder
from flashcore.jit.packaged import open_packaged
from flashcore.jit.target import INSTALL_HINT, MissingRuntimeError, detect_target
from flashcore.sm90.config.paged_schedule import ctas_per_sm

_HOPPER_CAPABILITY = (9, 0)


def available(device: torch.device | str | int) -> tuple[bool, str]:
    """Whether `device` runs the Hopper kernels, and the reason in words."""
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type != "cuda":
        return False, f"{found} is not a CUDA device"
    if not torch.cuda.is_available():
        return False, "torch sees no CUDA device"
    return _available(torch.cuda.current_device() if found.index is None else found.index)


@lru_cache(maxsize=64)
def _available(index: int) -> tuple[bool, str]:
    capability = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    if capability != _HOPPER_CAPABILITY:
        major, minor = capability
        return (
            False,
            f"{name} has compute capability {major}.{minor}; the kernels need 9.0 (Hopper)",
        )
    try:
        target = detect_target()
    except MissingRuntimeError as error:
        return False, str(error)
    if find_spec("tvm_ffi") is None:
        return False, f"apache-tvm-ffi is not installed; {INSTALL_HINT}"
    if find_spec("cutlass") is None and not (open_packaged(target)[0] or _some_are_cached()):
        return False, f"no kernel is compiled yet and the CuTe DSL is missing; {INSTALL_HINT}"
    return (
        True,
        f"{name}: kernels for {target.arch} through CuTe DSL {target.dsl} ({target.toolkit})",
    )


def _some_are_cached() -> bool:
    try:
        return any(default_folder().glob("*.so"))
    except OSError:  # no folder, or one that cannot be read
        return False


@lru_cache(maxsize=64)
def sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def resident_ctas(
    device: torch.device, head_dim: int, tile_m: int, v_head_dim: int | None = None
) -> int:
    """CTAs of the paged kernel that a CUDA device runs at once."""
    return sm_count(device) * ctas_per_sm(head_dim, tile_m, v_head_dim)
