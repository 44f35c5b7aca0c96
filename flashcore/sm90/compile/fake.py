"""Tensors that stand for a launch's arguments while a kernel is compiled: extents and strides that
may vary are symbols, and what a launch must keep to (alignment, divisibility) is said."""

from __future__ import annotations

from typing import Any

COMPILE_OPTIONS = "--enable-tvm-ffi --opt-level 3"


def compiled(kernel: Any, *arguments: Any, options: str) -> Any:
    """`kernel` compiled for such arguments, launched on the caller's current stream."""
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_stream

    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(kernel, *arguments, stream, options=f"{COMPILE_OPTIONS} {options}".strip())


def element_of(dtype: str) -> Any:
    """The DSL's type of "bf16" or "fp16"."""
    from cutlass import BFloat16, Float16

    return {"bf16": BFloat16, "fp16": Float16}[dtype]


def strided(element: Any, *shape: Any) -> Any:
    """Free strides in multiples of the 16 bytes that TMA and 16-byte copies need."""
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_tensor

    vector = max(8, 128 // element.width)
    stride = [cute.sym_int64(divisibility=vector) for _ in shape[:-1]]
    return make_fake_tensor(element, shape, (*stride, 1), assumed_align=16)


def vector(element: Any, extent: Any) -> Any:
    """Elements one beside the other."""
    from cutlass.cute.runtime import make_fake_tensor

    return make_fake_tensor(element, (extent,), (1,), assumed_align=element.width // 8)


def any_stride(element: Any, extent: Any) -> Any:
    """Elements at any distance, as of a single one that is repeated."""
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_tensor

    stride = (cute.sym_int64(),)
    return make_fake_tensor(element, (extent,), stride, assumed_align=element.width // 8)


def matrix(element: Any, rows: Any, columns: Any, align: int) -> Any:
    """Rows of any distance, that begin at multiples of `align` bytes."""
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_tensor

    return make_fake_tensor(element, (rows, columns), (cute.sym_int64(), 1), assumed_align=align)


def table(element: Any, rows: Any, columns: int, align: int = 16) -> Any:
    """Rows one beside the other."""
    from cutlass.cute.runtime import make_fake_tensor

    return make_fake_tensor(element, (rows, columns), (columns, 1), assumed_align=align)
