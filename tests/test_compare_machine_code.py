"""`tools/compare_machine_code.py`: what counts as the same kernel, and as the same code."""

from __future__ import annotations

from tools import compare_machine_code as tool

SASS = """
        .section .text.kernel_cutlass_kernel_flashcore_one
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   CALL.REL.NOINC `(kernel_cutlass_kernel_flashcore_one) ;
        /*0020*/                   EXIT ;
"""


def code(sass: str = SASS, registers: int = 168) -> tool.Code:
    return tool.Code((registers, 0, 1024, 2048), tool.instructions(sass))


def test_addresses_and_names_of_functions_do_not_count() -> None:
    moved = SASS.replace("flashcore_one", "flashcore_elsewhere").replace("/*00", "/*0a")
    assert tool.differences({"paged": code()}, {"paged": code(moved)}) == []


def test_operands_and_registers_do() -> None:
    other = code(SASS.replace("R1,", "R2,"))
    (line,) = tool.differences({"paged": code()}, {"paged": other})
    assert line.startswith("instruction 0 of 4: ('LDC R1, c[0x0][0x28] ;',), then ('LDC R2,")
    (line,) = tool.differences({"paged": code()}, {"paged": code(registers=169)})
    assert line.startswith("resources (168, 0, 1024, 2048), then (169,")


def test_kernels_are_matched_by_what_describes_them() -> None:
    found = tool.differences(
        {"paged a": code(), "merge": code()}, {"paged b": code(), "merge": code()}
    )
    assert found == ["only before: paged a", "only after: paged b"]
    assert tool.renamed("combine head_dim=64", {"combine": "merge"}) == "merge head_dim=64"
    assert tool.renamed("paged combine", {"combine": "merge"}) == "paged combine"
