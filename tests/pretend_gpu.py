"""CPU tensors that pass for a GPU's, to call compiled functions where there is none."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="would launch on addresses of the host"
)


class PretendCuda:
    """A CPU tensor that tells DLPack it lies on GPU 0."""

    def __init__(self, value: torch.Tensor) -> None:
        self.value = value

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self.value.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        # DLTensor: the data pointer, then the device type.
        ctypes.c_int32.from_address(pointer(capsule, b"dltensor") + 8).value = 2
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def pretend(value: Any) -> Any:
    """Tensors of GPU 0 as a compiled function takes them, in tuples too: it checks its arguments
    before it asks for a driver that is not there."""
    import tvm_ffi

    if isinstance(value, tuple):
        pretended = map(pretend, value)
        return value._make(pretended) if hasattr(value, "_make") else tuple(pretended)
    return tvm_ffi.from_dlpack(PretendCuda(value)) if isinstance(value, torch.Tensor) else value
