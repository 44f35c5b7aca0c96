"""Tensors as kernels take them: dtypes by name, strides for TMA, small vectors packed."""

from __future__ import annotations

import torch

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
FP8_NAMES = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
_TMA_BYTES = 16


def tma_ready(name: str, value: torch.Tensor) -> torch.Tensor:
    """`value` if TMA can address it as it lies, else the same data with legal strides, or an error.

    TMA wants 16 bytes: of the first element's address, and of every stride but the last.
    """
    strides, elements = value.stride(), _TMA_BYTES // value.element_size()
    mixed = 0
    for stride in strides[:-1]:
        mixed |= stride
    if not mixed % elements and strides[-1] == 1 and not value.data_ptr() % _TMA_BYTES:
        return value
    if strides[-1] != 1 and value.shape[-1] != 1:
        raise ValueError(f"{name} must have a contiguous last axis, got strides {strides}")
    if value.data_ptr() % _TMA_BYTES:
        raise ValueError(
            f"{name} must start at an address divisible by {_TMA_BYTES}, got a view at storage "
            f"offset {value.storage_offset()} (elements); call {name}.contiguous()"
        )
    for axis, stride in enumerate(strides[:-1]):
        if stride % elements and value.shape[axis] != 1:
            raise ValueError(
                f"{name} has stride {stride} in dimension {axis}; the Hopper kernel takes "
                f"multiples of {elements} elements; call {name}.contiguous()"
            )
    # The stride of an axis with one element means nothing to torch, and yet TMA checks it.
    legal = [s if s % elements == 0 else elements for s in strides[:-1]]
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
