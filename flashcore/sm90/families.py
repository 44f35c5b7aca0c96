"""The families of kernels for Hopper: how each is compiled, and what its machine code must hold."""

from __future__ import annotations

from flashcore.jit.kernel import Family
from flashcore.sm90.config.paged import PagedConfig


def _paged_opcodes(config: PagedConfig) -> tuple[str, ...]:
    """What signals a stage shows how K and V come: by TMA, or by LDGSTS, as 16-bit Q does too."""
    converted = (f"F2FP.F16.{config.kv_dtype.upper()}.UNPACK_B",) if config.kv_dtype else ()
    if config.kv_load == "gather":
        return ("HGMMA", "LDGSTS.E.BYPASS", "ARRIVES.LDGSTSBAR", *converted)
    return ("HGMMA", "UTMALDG", *converted)


DENSE = Family("dense", "flashcore.sm90.compile.dense:compile_dense")
PAGED = Family("paged", "flashcore.sm90.compile.paged:compile_paged", opcodes_of=_paged_opcodes)
MERGE = Family("merge", "flashcore.sm90.compile.merge:compile_merge", ("LDG",))
PLANNER = Family("planner", "flashcore.sm90.compile.planner:compile_planner", ("REDG", "SHFL"))
PAGER = Family("pager", "flashcore.sm90.compile.pager:compile_pager", ("SHFL",))

FAMILIES = (DENSE, PAGED, MERGE, PLANNER, PAGER)
