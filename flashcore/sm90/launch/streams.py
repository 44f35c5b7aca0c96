"""What launches keep for each stream, and what they ask of the current one at the least cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashcore.jit.load import prepared

_scratch: dict[tuple[int, int], Any] = {}  # by device index and stream handle
_units: dict[tuple[int, int], torch.Tensor] = {}
# What torch.cuda.current_device() calls when CUDA is initialised, as it is once there are tensors.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def lasting_stream(device_index: int) -> int | None:
    """Handle of the current stream, to keep buffers by; None while a graph is captured from it."""
    stream: int = torch._C._cuda_getCurrentRawStream(device_index)
    # The legacy stream, 0, cannot be captured, and the question costs as much as the handle.
    return None if stream and torch._C._cuda_isCurrentStreamCapturing() else stream


def unit_scale(device_index: int) -> torch.Tensor:
    """1.0, fp32 (); as with `scheduler_scratch`, a captured graph makes its own."""
    stream = lasting_stream(device_index)
    found = None if stream is None else _units.get((device_index, stream))
    if found is None:
        found = torch.ones((), dtype=torch.float32, device=f"cuda:{device_index}")
        if stream is not None:
            _units[device_index, stream] = found
    return found


def scheduler_scratch(device_index: int) -> Any:
    """The tile counters, int32 [2]: zero, and left at zero by every launch that uses them.

    Launches on one stream follow each other, so one buffer for each stream is enough. A captured
    graph may be replayed beside that stream and gets a buffer of its own, zeroed by the graph.
    """
    stream = lasting_stream(device_index)
    if stream is None:
        return torch.zeros(2, dtype=torch.int32, device=f"cuda:{device_index}")
    found = _scratch.get((device_index, stream))
    if found is None:
        found = prepared(torch.zeros(2, dtype=torch.int32, device=f"cuda:{device_index}"))
        _scratch[device_index, stream] = found
    return found
