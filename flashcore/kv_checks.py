"""Checks of a KV pool in any dtype that pages may have, and of the scales that go with fp8 pages.

Used by `paged_attention` and `append_kv`; nothing here waits for an accelerator.
"""

from __future__ import annotations

import torch

from flashcore import validate

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
PAGE_DTYPES = (*validate.FLOAT_DTYPES, *FP8_DTYPES)
QUERY_DTYPES = (torch.bfloat16, torch.float16)
"""Of q on fp8 pages."""


def page_dtypes(k_pages: object, v_pages: object) -> None:
    """K and V pages are tensors [num_pages, page_tokens, num_kv_heads, dim] in dtypes of pages."""
    for name, value in (("k_pages", k_pages), ("v_pages", v_pages)):
        if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
            raise TypeError(
                f"{name} has dtype uint8, which does not say what the bytes are: pass fp8 pages as "
                f"{name}.view(torch.float8_e4m3fn) or {name}.view(torch.float8_e5m2); formats of 4 "
                "bits are not taken"
            )
        validate.tensor(name, value, dtypes=PAGE_DTYPES, ndim=4)


def same_dtypes(q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor) -> None:
    """All three have one dtype; or K and V, if fp8, with q in 16 bits."""
    if k_pages.dtype not in FP8_DTYPES and v_pages.dtype not in FP8_DTYPES:
        validate.same_dtype("q", q, k_pages=k_pages, v_pages=v_pages)
        return
    validate.same_dtype("k_pages", k_pages, v_pages=v_pages)
    if q.dtype not in QUERY_DTYPES:
        raise TypeError(f"q must be bfloat16 or float16 with {_pages(k_pages)}, got {_name(q)}")


def scales(
    reference_name: str,
    reference: torch.Tensor,
    k_pages: torch.Tensor,
    *,
    k_scale: object,
    v_scale: object,
) -> None:
    """Each scale is None or a float32 tensor, one or one for each KV head, where `reference` is."""
    heads = k_pages.shape[2]
    for name, value in (("k_scale", k_scale), ("v_scale", v_scale)):
        if value is None:
            continue
        what = f"a float32 tensor of shape () or [num_kv_heads] = [{heads}]"
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be None or {what}, got {type(value).__name__}")
        if value.layout != torch.strided or value.dtype != torch.float32:
            got = _name(value) if value.layout == torch.strided else value.layout
            raise TypeError(f"{name} must be {what}, got {got}")
        if tuple(value.shape) not in ((), (heads,)):
            raise ValueError(
                f"{name} must be {what}, got shape {tuple(value.shape)}; a scale for each sequence "
                "or page is not taken, since sequences share pages"
            )
        validate.same_device(reference_name, reference, **{name: value})
        validate.no_grad(**{name: value})
        if k_pages.dtype not in FP8_DTYPES:
            raise ValueError(
                f"{name} goes with fp8 pages (float8_e4m3fn or float8_e5m2), got {_pages(k_pages)}"
            )


def _pages(k_pages: torch.Tensor) -> str:
    return f"k_pages of {_name(k_pages)}"


def _name(value: torch.Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
