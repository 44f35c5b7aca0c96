"""Values that are handed on whole, and that nothing spells them out again."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import flashcore
from flashcore import ops, validate
from flashcore.planner.types import Plan, PlanNumbers, PlanTensors
from flashcore.problem import Extras, KVPool, Packing, Problem, Rules
from tests.test_paged_attention import shared_batch

PACKAGE = Path(__file__).parents[1] / "flashcore"

# ---------------------------------------------------------------- parameters

MOST = 8
MANY = {
    # public functions
    "api.attention",
    "api.paged_attention",
    "append.append_kv",
    "planner.build.plan",
    "reference.attention_reference",
    "reference.paged_attention_reference",
    "sm90.device_planner.DevicePlanner.__init__",
    # the contracts of vLLM and of transformers
    "integrations.vllm.backend.FlashcoreBackend.supports_combination",
    "integrations.vllm.impl.FlashcoreImpl.__init__",
    "integrations.vllm.impl.FlashcoreImpl.forward",
    "integrations.transformers.attention.attention_forward",
    "integrations.transformers.mask.attention_spans",
    # the contract of Triton
    "append_kernel._scatter",
    "expand_kernel._expand",
    "expand_plan_kernel._number",
    "expand_plan_kernel._place",
    "serving.page_table_kernel._fill",
    # the specification, as plain as it can be
    "reference.sequence_attention",
}
# What is compiled for a device takes its operands one by one.
KERNELS = "sm90.kernels."


def parameters() -> Iterator[tuple[str, int]]:
    """Every function of the package by name, but those of kernels, and its parameters but self."""

    def visit(node: ast.AST, inside: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                yield from visit(child, f"{inside}.{child.name}")
            elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                given = child.args
                names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                yield f"{inside}.{child.name}", len(set(names) - {"self", "cls"})
                yield from visit(child, f"{inside}.{child.name}")
            else:
                yield from visit(child, inside)

    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not module.startswith(KERNELS):
            yield from visit(ast.parse(path.read_text()), module)


def test_no_function_takes_a_long_list() -> None:
    assert {name for name, count in parameters() if count > MOST} == MANY


# ---------------------------------------------------------------- the operators

POOL = ("k_pages", "v_pages", "k_scale", "v_scale")


@pytest.mark.parametrize(
    ("op", "schema", "row"),
    [
        (
            ops.attention_op,
            ops.ATTENTION,
            ("q", "k", "v", *Rules._fields, "sinks", *Packing._fields, "return_lse", "impl"),
        ),
        (
            ops.paged_attention_op,
            ops.PAGED_ATTENTION,
            (
                *("q", *POOL, *PlanTensors._fields, *PlanNumbers._fields),
                *(*Rules._fields, *Extras._fields, "impl"),
            ),
        ),
    ],
    ids=["attention", "paged_attention"],
)
def test_operators_take_the_fields_in_their_order(op, schema: str, row: tuple[str, ...]) -> None:
    taken = op._opoverload._schema.arguments
    assert tuple(argument.name for argument in taken) == row
    assert tuple(re.findall(r"\w+\?? (\w+)[,\n]", schema)) == row


def test_the_pool_and_the_operator_agree() -> None:
    assert KVPool._fields == tuple(name.removesuffix("_pages") for name in POOL)


# ---------------------------------------------------------------- what values say


def test_a_problem_knows_its_bytes() -> None:
    problem = Problem(16, 4, 192, 128, page_tokens=16, itemsize=1)
    assert problem.group_size == 4
    assert problem.kv_token_bytes == 4 * (192 + 128)
    assert problem.partial_bytes == 16 * (4 * 128 + 4)


@pytest.mark.parametrize("bound", [validate.INT32_MAX, 2**63 - 1])
def test_a_bound_that_no_sequence_reaches_does_not_bind(bound: int) -> None:
    assert Rules.of(1.0, False, (bound, bound)) == Rules(1.0)
    assert not Rules.of(1.0, False, (bound, -1)).windowed
    assert Rules.of(1.0, False, (7, bound)) == Rules(1.0, False, 7)
    assert Rules.of(1.0, False, (7, bound)).windowed


def test_a_plan_knows_its_problem_and_hands_on_its_tensors() -> None:
    batch = shared_batch()
    plan = batch.plan(itemsize=1)
    assert plan.problem == Problem(
        *(batch.num_q_heads, batch.num_kv_heads, batch.head_dim, plan.v_head_dim),
        *(batch.page_tokens, 1),
    )
    assert plan.to("cpu").problem == plan.problem
    assert plan.stats().problem == plan.problem
    tensors, numbers, counts, workspace, expansion = plan.planned
    assert all(getattr(plan, name) is value for name, value in tensors._asdict().items())
    assert all(getattr(plan, name) == value for name, value in numbers._asdict().items())
    assert counts is workspace is None
    assert expansion is plan.expansion is not None


def test_a_device_plan_does_too() -> None:
    planner = flashcore.DevicePlanner(
        flashcore.Capacities(5, 300, 20),
        num_pages=9,
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=64,
        page_tokens=16,
        itemsize=1,
        device="cpu",
    )
    for plan in (planner.plan, planner.variant(tile_m=128).plan):
        assert plan.problem == Problem(8, 2, 64, 64, 16, 1)
        tensors, numbers, counts, workspace, _ = plan.planned
        assert all(getattr(plan, name) is value for name, value in tensors._asdict().items())
        assert numbers == (len(plan.partial_lse), True, plan.tile_m, False)
        assert counts is plan.counts
        assert workspace is not None
        assert all(getattr(plan, name) is value for name, value in workspace._asdict().items())


# ---------------------------------------------------------------- page_tokens


def plan_of(layout: flashcore.Layout, **options: int) -> Plan:
    return flashcore.plan(layout, num_q_heads=4, num_kv_heads=2, head_dim=64, **options)


def test_a_layout_knows_its_page_tokens() -> None:
    table, lengths = torch.tensor([[0, 1]]), torch.tensor([20])
    layout = flashcore.layout_from_page_table(table, lengths, page_tokens=16)
    assert layout.page_tokens == plan_of(layout).page_tokens == 16
    assert plan_of(layout, page_tokens=16).page_tokens == 16
    tokens = torch.zeros(20, dtype=torch.int32)
    by_tokens = flashcore.build_layout(tokens, torch.tensor([0]), lengths, page_tokens=8)
    assert by_tokens.page_tokens == plan_of(by_tokens).page_tokens == 8


@pytest.mark.parametrize("page_tokens", [8, 32, 128])
def test_a_plan_cannot_have_others_than_its_layout(page_tokens: int) -> None:
    """Fewer used to be caught by a page that held more; more were taken, and read wrong slots."""
    layout = flashcore.layout_from_page_table(
        torch.tensor([[0, 1]]), torch.tensor([20]), page_tokens=16
    )
    message = f"page_tokens must be what the layout was built with, 16, got {page_tokens}"
    with pytest.raises(ValueError, match=message):
        plan_of(layout, page_tokens=page_tokens)


def test_a_layout_that_contradicts_itself_is_named() -> None:
    layout = flashcore.layout_from_page_table(
        torch.tensor([[0, 1]]), torch.tensor([20]), page_tokens=16
    )
    with pytest.raises(ValueError, match=r"pages of 8 tokens .*, and one that holds 16"):
        plan_of(layout._replace(page_tokens=8))
    with pytest.raises(TypeError, match=r"layout\.page_tokens must be an int, got NoneType"):
        plan_of(layout._replace(page_tokens=None))
