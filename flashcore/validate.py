"""Host-side checks of arguments: each failure is one error naming the argument, what came, what may
come.

Checks that must look at the contents of a tensor on an accelerator wait for that device; they run
in the pager and the planner, once per batch, and never in an attention call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, isfinite
from numbers import Real
from operator import index
from typing import SupportsIndex

import torch

INT_DTYPES = (torch.int32, torch.int64)
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT32_MAX = 2**31 - 1


def positive_int(name: str, value: object, *, maximum: int = INT32_MAX) -> int:
    """`value` as an int of at least 1, or a TypeError/ValueError naming `name`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1 or value > maximum:
        upper = "" if maximum >= INT32_MAX and value < 1 else f" and at most {maximum}"
        raise ValueError(f"{name} must be at least 1{upper}, got {value}")
    return value


def finite(name: str, value: object, what: str) -> float:
    """`value` as a finite float; `what` else it must be, for the message. Of tensors only a number
    on the CPU is taken, for which nothing has to wait."""
    if isinstance(value, (torch.SymFloat, torch.SymInt)):  # under a compiler
        return value  # type: ignore[return-value]
    if isinstance(value, torch.Tensor) and value.dim() == 0 and value.device.type == "cpu":
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = inf
    if not isfinite(number):
        raise ValueError(f"{name} must be finite and {what}, got {number}")
    return number


def flag(name: str, value: object) -> bool:
    """`value` if it is True or False: a string such as "no" would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def int_list(name: str, values: object) -> list[int]:
    """`values` as a list of int32 values: a float would be cut off."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a tensor or a sequence of ints, got {values!r}")
    found = list(values)
    for i, value in enumerate(found):
        if isinstance(value, bool) or not isinstance(value, SupportsIndex):
            raise TypeError(f"{name}[{i}] must be an int, got {value!r}")
        if not -INT32_MAX <= index(value) <= INT32_MAX:
            raise ValueError(f"{name}[{i}] must be below 2**31, got {value}")
    return [index(value) for value in found]


def lengths_of(name: str, ends: object, rows: str, batch: int) -> torch.Tensor:
    """[batch] lengths from cumulative ones of [batch + 1], 0 first. `rows` names what there are
    `batch` of. The values are checked on the CPU, where nothing has to be waited for."""
    ends = tensor(name, ends, dtypes=INT_DTYPES, ndim=1)
    readable(**{name: ends})
    if ends.numel() != batch + 1:
        raise ValueError(
            f"{name} must have one element more than {rows} ({batch}), got {ends.numel()}"
        )
    lengths = ends.diff()
    if ends.device.type == "cpu":
        if int(ends[0]) != 0:
            raise ValueError(f"{name} must begin with 0, got {int(ends[0])}")
        if lengths.numel() and int(lengths.min()) < 0:
            raise ValueError(f"{name} must not decrease, got {ends.tolist()}")
    return lengths


def readable(**values: torch.Tensor | None) -> None:
    """Tensors with contents to look at, in rows and columns: neither meta nor sparse."""
    for name, value in values.items():
        if value is not None and (value.is_meta or value.layout != torch.strided):
            what = "on the meta device" if value.is_meta else str(value.layout)
            raise ValueError(f"{name} must be a dense tensor with contents, got one that is {what}")


def head_counts(num_q_heads: int, num_kv_heads: int) -> int:
    """Query heads per KV head (the GQA group), or an error where they do not divide."""
    positive_int("num_q_heads", num_q_heads)
    positive_int("num_kv_heads", num_kv_heads)
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_q_heads must be a multiple of num_kv_heads, got {num_q_heads} and {num_kv_heads}"
        )
    return num_q_heads // num_kv_heads


def head_dims(head_dim: int, v_head_dim: int | None) -> int:
    """v_head_dim, head_dim where it is not given, after checks of both."""
    positive_int("head_dim", head_dim)
    if v_head_dim is None:
        return head_dim
    positive_int("v_head_dim", v_head_dim)
    if v_head_dim > head_dim:
        raise ValueError(f"v_head_dim must be at most head_dim ({head_dim}), got {v_head_dim}")
    return v_head_dim


def dtype(name: str, value: object) -> torch.dtype:
    """`value` if it is a dtype of torch: a tensor has an itemsize, too."""
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype, got {value!r}")
    return value


def item_size(itemsize: int | None, of: torch.dtype | None) -> int:
    """Bytes of an element from what a user gave as itemsize and dtype; 2 where it is nothing."""
    if of is None:
        return positive_int("itemsize", 2 if itemsize is None else itemsize, maximum=8)
    size = dtype("dtype", of).itemsize
    if itemsize not in (None, size):
        raise ValueError(f"itemsize must be that of dtype {of}, {size}, got {itemsize}")
    return size


def tensor(
    name: str, value: object, *, dtypes: Sequence[torch.dtype], ndim: int | Sequence[int]
) -> torch.Tensor:
    """`value` if it is a tensor of an allowed dtype and rank."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout != torch.strided:
        raise ValueError(
            f"{name} must be a dense tensor with contents, got one that is {value.layout}"
        )
    if value.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must have dtype {allowed}, got {got}")
    ranks = (ndim,) if isinstance(ndim, int) else tuple(ndim)
    if value.dim() not in ranks:
        allowed = " or ".join(map(str, ranks))
        raise ValueError(f"{name} must have {allowed} dimensions, got shape {tuple(value.shape)}")
    return value


def device(name: str, value: object) -> torch.device:
    """`value` as a device that torch knows and, of CUDA devices, that there is."""
    if not isinstance(value, (str, torch.device)):
        raise TypeError(f"{name} must be a torch.device or its name, got {type(value).__name__}")
    try:
        found = torch.device(value)
    except RuntimeError:
        raise ValueError(
            f"{name} must be a device such as 'cuda' or 'cuda:0', got {value!r}"
        ) from None
    if found.type == "cuda" and (found.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"{name} must be one of the {count} CUDA devices here, got {value!r}")
    return found


def same_device(
    reference_name: str, reference: torch.Tensor, **others: torch.Tensor | None
) -> None:
    """All `others` live where `reference` lives."""
    for name, value in others.items():
        if value is not None and not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        if value is not None and value.device != reference.device:
            raise ValueError(
                f"{name} must be on the device of {reference_name} ({reference.device}), "
                f"got {value.device}"
            )


def same_dtype(reference_name: str, reference: torch.Tensor, **others: torch.Tensor) -> None:
    """All `others` have the dtype of `reference`."""
    for name, value in others.items():
        if value.dtype != reference.dtype:
            raise TypeError(
                f"{name} must have the dtype of {reference_name} ({reference.dtype}), "
                f"got {value.dtype}"
            )


def contiguous_last_axis(**values: torch.Tensor) -> None:
    """The last axis (head_dim) of each tensor has stride 1."""
    for name, value in values.items():
        if value.stride(-1) != 1 and value.shape[-1] > 1:
            raise ValueError(
                f"{name} must have a contiguous last axis (stride 1), got strides {value.stride()}"
            )


def first_index(mask: torch.Tensor) -> int:
    """Position of the first true element of a 1-D mask that has one."""
    return int(mask.nonzero()[0, 0])


def page_ids(name: str, ids: torch.Tensor, num_pages: int | None) -> None:
    """Every id is in 0 .. num_pages - 1 (below 2**31 where the pool size is not known)."""
    if ids.numel() == 0:
        return
    limit = INT32_MAX if num_pages is None else num_pages
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0:
        raise ValueError(f"{name} holds the page id {low}; page ids must be at least 0")
    if high >= limit:
        what = "2**31 - 1" if num_pages is None else f"num_pages = {num_pages}"
        raise ValueError(f"{name} holds the page id {high}; page ids must be below {what}")


def no_grad(**values: torch.Tensor | None) -> None:
    """Inference only: a tensor that asks for gradients would silently get none."""
    if not torch.is_grad_enabled():
        return
    for name, value in values.items():
        if value is not None and value.requires_grad:
            raise ValueError(
                f"{name} requires a gradient; flashcore computes the forward pass only: "
                "call it under torch.no_grad() or pass a detached tensor"
            )
