"""Tensors as kernels take them: dtypes by name, strides for TMA, small vectors packed."""

from __future__ import annotations

import torch

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_TMA_BYTES = 16
_TMA_ELEMENTS = 8  # of bf16 or fp16


def tma_ready(name: str, value: torch.Tensor) -> torch.Tensor:
    """`value` if TMA can address it as it lies, else the same data with legal strides, or an error.

    TMA wants 16 bytes: of the first element's address, and of every stride but the last.
    """
    strides = value.stride()
    mixed = 0
    for stride in strides[:-1]:
        mixed |= stride
    if not mixed % _TMA_ELEMENTS and strides[-1] == 1 and not value.data_ptr() % _TMA_BYTES:
        return value
    if strides[-1] != 1 and value.shape[-1] != 1:
        raise ValueError(f"{name} must have a contiguous last axis, got strides {strides}")
    if value.data_ptr() % _TMA_BYTES:
        raise ValueError(
            f"{name} must start at an address divisible by {_TMA_BYTES}, got a view at storage "
            f"offset {value.storage_offset()} (elements); call {name}.contiguous()"
        )
    for axis, stride in enumerate(strides[:-1]):
        if stride % _TMA_ELEMENTS and value.shape[axis] != 1:
            raise ValueError(
                f"{name} has stride {stride} in dimension {axis}; the Hopper kernel takes "
                f"multiples of {_TMA_ELEMENTS} elements; call {name}.contiguous()"
            )
    # The stride of an axis with one element means nothing to torch, and yet TMA checks it.
    legal = [s if s % _TMA_ELEMENTS == 0 else _TMA_ELEMENTS for s in strides[:-1]]
    return value.as_strided(value.shape, [*legal, 1])


def sink_logits(sinks: torch.Tensor | None) -> torch.Tensor | None:
    """[heads] as kernels read them: fp32, one beside the other."""
    if sinks is None:
        return None
    if sinks.dtype is not torch.float32:
        sinks = sinks.float()
    return packed(sinks)


def packed(vector: torch.Tensor) -> torch.Tensor:
    """`vector` with its elements one beside the other: small, so it is copied where it is not."""
    return vector if vector.stride(0) == 1 else vector.clone(memory_format=torch.contiguous_format)
