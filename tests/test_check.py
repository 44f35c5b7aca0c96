"""`flashcore check` with no GPU: what it tests, that it finds what is wrong, what it says.

Device planners are emulated, captured graphs are calls that are made again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import flashcore
from flashcore import DevicePager, DevicePlan, DevicePlanner, api
from flashcore.cli.check import bits, command, dense, paged, plants, steps, swap
from flashcore.cli.check.dense import DenseCase
from flashcore.cli.check.judge import Finding, SelfTest, Setting, judge
from flashcore.cli.check.paged import PagedCase
from flashcore.jit import cache as jit_cache
from flashcore.jit.kernel import Kernel
from flashcore.jit.prebuild import Built
from flashcore.sm90.families import DENSE, MERGE, PAGED
from flashcore.sm90.launch import paged as launch_paged
from flashcore.sm90.shipped import shipped_kernels
from tests.cli_calls import parse
from tests.emulation.pager import PagerEmulation
from tests.emulation.planner import Emulation
from tests.emulation.planner_chunks import ChunkEmulation

CPU = Setting("cpu", 0, kernels=False)
PRETEND = Setting("cpu", 0, kernels=True)  # as on a GPU, with what `gpu` puts in its place

# ---------------------------------------------------------------- what is tested


def test_every_shipped_head_dim_and_dtype_is_tested() -> None:
    configs = [(kernel.family, kernel.config) for kernel in shipped_kernels()]
    wanted = {(c.dtype, c.head_dim) for family, c in configs if family is DENSE}
    assert wanted <= {(case.dtype, case.head_dim) for case in dense.cases()}
    wanted = {(c.dtype, c.head_dim, c.v_head_dim) for family, c in configs if family is PAGED}
    assert wanted <= {(c.dtype, c.head_dim, c.value_dim) for c in paged.cases()}


def test_every_feature_is_tested() -> None:
    for cases in (dense.cases(), paged.cases()):
        assert any(case.sinks for case in cases)
        assert any(case.softcap for case in cases)
        assert any(case.window for case in cases)
    assert any(case.packed for case in dense.cases())
    assert any(case.tree for case in paged.cases())
    assert {case.tile_m for case in paged.cases()} == {64, 128}
    assert {1, 8, 64} <= {case.page_tokens for case in paged.cases()}
    names = [test.name for test in command.all_tests()]
    assert len(set(names)) == len(names)
    assert set().union(*(plant.found_by for plant in plants.PLANTS.values())) <= set(names)


# ---------------------------------------------------------------- that it finds what is wrong

SMALL = [
    DenseCase(
        "batched", ((70, 90),), 40, heads=(4, 2), causal=True, softcap=9.0, sinks=True, lse=True
    ),
    DenseCase("packed", ((3, 5), (0, 4), (6, 0)), 64, packed=True, window=(2, 2), lse=True),
    PagedCase("gathered", ((1, 70), (5, 40)), 40, page_tokens=1),
    PagedCase("boxes", ((1, 1100), (5, 1040), (3, 1039)), 24, 16, tree=True),
]
FAULTS = {
    "": "",
    "values": "the output is wrong",
    "NaN": "the output is wrong",
    "lse": "the LSE is wrong",
    "unstable": "two runs differ",
}


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(monkeypatch: pytest.MonkeyPatch, case: Any, fault: str) -> None:
    calls = [0]

    def damaged(right: Callable[..., Any]) -> Callable[..., Any]:
        def attend(*arguments: Any, **options: Any) -> Any:
            calls[0] += 1
            out, *lses = right(*arguments, **options)
            if fault == "values":
                out = out * 1.02
            if fault == "NaN":
                out.view(-1)[5] = float("nan")
            if fault == "unstable" and calls[0] % 2:
                out.view(-1)[0] *= 1.01
            return out, *(lse + 0.01 * (fault == "lse") for lse in lses)

        return attend

    for name in ("attention", "paged_attention"):
        monkeypatch.setattr(flashcore, name, damaged(getattr(api, name)))
    module: Any = dense if isinstance(case, DenseCase) else paged
    launched = module.launch(case, CPU)
    assert module.verdict(launched._replace(exact=True)).problem == FAULTS[fault]


def test_a_row_of_many_keys_counts_like_one_of_few() -> None:
    """Means of many values are small; their error must show beside one that is large."""
    expected = torch.tensor([[[3.0, 4.0]], [[0.03, 0.04]]], dtype=torch.float64)
    lse = torch.zeros(2, 1, dtype=torch.float64)
    wrong = expected.clone()
    wrong[1] *= 1.02
    assert judge((wrong, lse), (expected, lse), "bf16").problem == "the output is wrong"
    assert judge((expected, lse), (expected, lse), "bf16").problem == ""
    wrong[1] = torch.nan
    assert judge((wrong, lse), (expected, lse), "bf16").problem == "the output is wrong"


class EmulatedGpu:
    """Planners and pagers whose kernels are emulated, and attention by torch on the same batch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: dict[int, tuple[torch.Tensor, ...]] = {}
        self.emulations: dict[int, Any] = {}
        self.damage: Callable[[torch.Tensor, int], None] = lambda out, rows: None
        gpu = self

        def plan(planner: DevicePlanner, table: Any, lens: Any, q_lens: Any, layout: Any) -> Any:
            kind = ChunkEmulation if planner.plan.batch_invariant else Emulation
            emulation = gpu.emulations.setdefault(id(planner), kind(planner))
            if layout is None:
                emulation.update(table, lens, q_lens)
            else:
                table, lens = gpu.batches[id(layout)]
                emulation.update_from_layout(layout, q_lens)
            gpu.batches[id(planner.plan)] = (table.clone(), lens.clone(), q_lens.clone())
            return planner.plan

        def lay_out(pager: DevicePager, tokens: bool, pages: Any, begins: Any, ends: Any, _: Any):
            PagerEmulation(pager).update(pages, begins, ends, None)
            gpu.batches[id(pager.layout)] = pages, ends
            return pager.layout

        monkeypatch.setattr(DevicePlanner, "_launch", plan)
        monkeypatch.setattr(DevicePager, "_launch", lay_out)
        monkeypatch.setattr(steps, "captured", gpu.captured)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
        monkeypatch.setattr(paged, "attend", gpu.attend)

    def attend(self, batch: paged.Batch, plan: Any, options: dict[str, Any]) -> Any:
        """With a device's plan: NaN for the sequences that it could not plan."""
        if not isinstance(plan, DevicePlan):
            out, lse = flashcore.paged_attention(*batch[:3], plan, return_lse=True, **options)
            self.damage(out, len(out))
            return out, lse
        table, lens, q_lens = self.batches[id(plan)]
        good = plan.bad[: len(lens)] == 0
        host = flashcore.plan(
            flashcore.layout_from_page_table(
                torch.where(good[:, None], table, 0), lens * good, page_tokens=plan.page_tokens
            ),
            q_lens=q_lens * good,
            num_q_heads=plan.num_q_heads,
            num_kv_heads=plan.num_kv_heads,
            head_dim=plan.head_dim,
            batch_invariant=plan.batch_invariant,
        )
        total = int(q_lens.sum())
        row = torch.arange(len(lens)).repeat_interleave(q_lens.long())
        held = torch.zeros(len(batch.q), dtype=torch.bool)
        held[:total] = good[row]
        out = torch.zeros_like(batch.q)
        lse = torch.full(out.shape[:2], -torch.inf)
        out[:total], lse[:total] = torch.nan, torch.nan
        out[held], lse[held] = flashcore.paged_attention(
            batch.q[held], batch.k, batch.v, host, return_lse=True
        )
        self.damage(out, len(batch.q))
        return out, lse

    def captured(self, call: Callable[[], Any]) -> tuple[Any, Any]:
        results = call()
        flat = results if isinstance(results, tuple) else (results,)

        class Graph:
            def replay(self) -> None:
                again = call()
                again = again if isinstance(again, tuple) else (again,)
                for old, new in zip(flat, again, strict=True):
                    old.copy_(new)

        return Graph(), results


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> EmulatedGpu:
    return EmulatedGpu(monkeypatch)


def run_step(name: str) -> Finding:
    test = next(test for test in (*steps.tests(), *bits.tests()) if test.name == name)
    return test.judge(test.launch(PRETEND))


@pytest.mark.parametrize(
    "name",
    [
        "planner in a graph, pages of 64",
        "plan from a device layout",
        "faults are told",
        "attention in a graph",
    ],
)
def test_steps_pass_where_all_is_well(
    gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    finding = run_step(name)
    assert finding.problem == ""
    assert finding.detail


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("planner in a graph, pages of 64", "the output is wrong"),
        ("plan from a device layout", "the output is wrong"),
        ("faults are told", "sequences that could not be planned have results"),
    ],
)
def test_steps_fail_where_results_are_wrong(gpu: EmulatedGpu, name: str, problem: str) -> None:
    gpu.damage = lambda out, rows: out.nan_to_num_(1.0).mul_(1.02)
    assert run_step(name).problem == problem


def test_rows_without_a_sequence_must_stay_empty(gpu: EmulatedGpu) -> None:
    gpu.damage = lambda out, rows: out[4:].add_((out[4:] == 0).all(-1, keepdim=True).to(out.dtype))
    problem = run_step("planner in a graph, pages of 64").problem
    assert problem == "rows without a sequence are not zero"


def test_a_fault_that_is_not_told_is_found(gpu: EmulatedGpu) -> None:
    well = torch.zeros(5, 1, 8)
    faulty = well.clone()
    faulty[[1, 3]] = torch.nan
    told = (4 | 1, 1, 3)
    right = steps.Faulty((well, well), (faulty, well), (well, well), [0, 4, 0, 1, 0], told)
    assert steps.judge_faults(right).problem == ""
    for wrong, problem in (
        ({"bad": [0, 4, 0, 0, 0]}, "bad is"),
        ({"seen": (4, 1, 1)}, "the host was told"),
        ({"seen": (0, 0, 0)}, "the host was told"),
        ({"faulty": (torch.full_like(well, torch.nan), well)}, "reached another"),
        ({"again": (faulty, well)}, "outlived its batch"),
    ):
        assert problem in steps.judge_faults(right._replace(**wrong)).problem


def test_other_bits_in_company_are_found() -> None:
    alone = [(torch.ones(2, 1), torch.ones(2)), (torch.zeros(1, 1), torch.zeros(1))]
    together = torch.cat([out for out, _ in alone]), torch.cat([lse for _, lse in alone])
    run = bits.Company(alone, together, [2, 1])
    assert bits.judge_company(run).problem == ""
    other = together[0] + torch.tensor([[0], [0], [1e-7]])
    run = run._replace(together=(other, together[1]))
    assert bits.judge_company(run).problem == "sequence 1 has other bits in company"


def test_a_page_table_that_is_taken_is_found() -> None:
    said = steps.launch_refusals(CPU)
    assert steps.judge_refusals(said).problem == ""
    assert steps.judge_refusals(["", said[1]]).problem
    assert steps.judge_refusals([said[0], "device-side assert"]).problem


# ---------------------------------------------------------------- other functions in kernels' place


class Recorded:
    """In place of the kernel cache: functions that write down how they were called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def function(self, kernel: Kernel) -> Any:
        return lambda *arguments: self.calls.append((kernel.family.name, arguments))


@pytest.mark.parametrize("name", plants.PLANTS)
def test_plants_change_what_they_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: Any = Recorded()
    monkeypatch.setattr(jit_cache, "_shared", recorded)
    kernels = {kernel.family.name: kernel for kernel in shipped_kernels()}
    out = torch.ones(8, 1, 4)
    given = {"out": out, "softmax_scale": 0.5, "window_left": 127}
    arguments: dict[str, tuple[Any, ...]] = {
        family: tuple(given.get(field) for field in operands._fields)
        for family, operands in plants.ATTENTION.items()
    }
    arguments |= {
        "merge": (out, None),
        "planner": (None, torch.tensor([3, 300]), None, None),
    }
    with plants.planted(name, PRETEND):
        cache: Any = jit_cache.shared_cache()
        for family, given in arguments.items():
            cache.function(kernels[family])(*given)
    assert jit_cache.shared_cache() is recorded
    told = dict(recorded.calls)
    dense, paged = (operands(*told[family]) for family, operands in plants.ATTENTION.items())
    changed = {family for family in arguments if not _same(told[family], arguments[family])}
    assert set(told) == set(arguments)
    expected: dict[str, set[str]] = {
        "scale": {"dense", "paged"},
        "window": {"dense", "paged"},
        "planner": {"planner"},
    }
    assert changed == expected.get(name, set())
    # The others change the result.
    assert (out == 1).all() == (name in expected)
    if name == "scale":
        assert dense.softmax_scale == paged.softmax_scale == 0.51
    if name == "window":
        assert dense.window_left == paged.window_left == 126
    if name == "planner":
        assert told["planner"][1].tolist() == [3, 299]


def _same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return all(
        torch.equal(x, y) if isinstance(y, torch.Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def test_launches_forget_functions_that_were_put_in_their_place() -> None:
    before = launch_paged._functions, api._dense_launches
    with (
        contextlib.suppress(RuntimeError),
        swap.functions_from(lambda kernel, right: right, None),
    ):
        assert launch_paged._functions is not before[0]
        raise RuntimeError
    assert (launch_paged._functions, api._dense_launches) == before
    assert launch_paged._functions is before[0]


def test_kernels_of_tests_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = next(kernel for kernel in shipped_kernels() if kernel.family is MERGE)

    def launch(setting: Setting) -> Any:
        assert jit_cache.shared_cache().function(kernel)(1, 2) is None
        raise RuntimeError("no GPU")

    tests = [SelfTest(str(i), launch, lambda _: pytest.fail("judged")) for i in range(2)]
    assert swap.kernels_of(tests, PRETEND) == {"0": [kernel], "1": [kernel]}


# ---------------------------------------------------------------- the command


def passing(name: str = "a test", **options: Any) -> SelfTest:
    return SelfTest(name, lambda setting: setting, lambda _: Finding("", "measured"), **options)


def failing(name: str = "another") -> SelfTest:
    return SelfTest(name, lambda setting: None, lambda _: Finding("it is wrong", "measured"))


def raising(error: Exception) -> SelfTest:
    def launch(setting: Setting) -> None:
        raise error

    return SelfTest("a raiser", launch, lambda _: Finding(""))


def run(monkeypatch: pytest.MonkeyPatch, tests: list[SelfTest], *words: str) -> int:
    monkeypatch.setattr(command, "all_tests", lambda: tests)
    return command.run(parse(command, *words))


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")


@no_gpu
def test_a_machine_without_a_gpu_tests_torch_operators_and_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = [passing(), passing("graphs", needs_kernels=True), passing("pairs", least_gpus=2)]
    assert run(monkeypatch, tests) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cpu: torch operators; no kernel is tested, since torch sees no")
    assert lines[1].split() == ["ok", "a", "test", "measured"]
    assert lines[2].split()[:2] == ["skipped", "graphs"]
    assert lines[3].endswith("needs 2 GPUs, here are 0")
    assert lines[-1].startswith("PASSED: 1 tests, 2 skipped, in ")
    assert lines[-1].endswith("(torch operators on the CPU, no kernels)")


@no_gpu
@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--device", "cuda"), "torch sees no CUDA device"),
        (("--plant", "merge"), "--plant merge needs a Hopper GPU"),
        (("--only", "no such test"), "no test has 'no such test' in its name"),
    ],
)
def test_what_cannot_be_tested_is_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], reason: str
) -> None:
    assert command.run(parse(command, *words)) == 2
    said = capsys.readouterr()
    assert reason in said.err
    assert (said.err.count("\n"), said.out) == (1, "")


def test_the_verdict_names_what_failed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("the launch failed\nwith details")
    tests = [passing(), failing(), raising(error), passing("the last")]
    assert run(monkeypatch, tests, "--device", "cpu") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["ok", "FAILED", "FAILED", "ok"]
    assert lines[2].endswith("measured  it is wrong")
    assert lines[3].endswith("RuntimeError: the launch failed")
    assert lines[5].startswith("FAILED: 2 of 4 tests, in")
    assert lines[6:] == ["  another", "  a raiser"]


def test_an_error_without_a_message_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, [raising(AssertionError())], "--device", "cpu") == 1
    assert "AssertionError: AssertionError\n" in capsys.readouterr().out


def test_a_planted_wrong_kernel_fails_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--device", "cpu", "--only", "decode on a shared prefix", "--plant", "scale")
    assert command.run(parse(command, *words)) == 1
    said = capsys.readouterr().out
    assert "the output is wrong" in said
    assert "FAILED: 1 of 1 tests, in" in said


def test_every_check_plants_wrong_kernels_and_must_find_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--device", "cpu", "--only", "decode on a shared prefix")
    assert command.run(parse(command, *words)) == 0
    assert "finds scores scaled by 1.02" in capsys.readouterr().out
    monkeypatch.setattr(paged, "expected", lambda case, batch, options: None)
    monkeypatch.setattr(paged, "judge", lambda *_: Finding("", "blind"))
    assert command.run(parse(command, *words)) == 1
    assert "'paged, decode on a shared prefix' did not find it" in capsys.readouterr().out


@pytest.mark.parametrize("compiler", [True, False])
def test_missing_kernels_are_compiled_together_first(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Any,
    compiler: bool,
) -> None:
    first, second = shipped_kernels()[:2]

    class Cache:
        folder, target, no_folder = tmp_path, None, None

        def origin(self, kernel: Kernel) -> str | None:
            return "from the wheel" if kernel is first else None

    asked: list[tuple[list[Kernel], int]] = []

    def prebuild(kernels: Any, folder: Any, target: Any, jobs: int, on_done: Any) -> Any:
        asked.append((kernels, jobs))
        built = [Built(kernel, True, None) for kernel in kernels]
        for b in built:
            on_done(b)
        return built

    def launch(setting: Setting) -> None:
        for kernel in (first, second):
            jit_cache.shared_cache().function(kernel)()

    monkeypatch.setattr(jit_cache, "_shared", Cache())
    monkeypatch.setattr("flashcore.jit.prebuild.prebuild", prebuild)
    monkeypatch.setattr("flashcore.jit.gates.default_jobs", lambda: 99)
    monkeypatch.setattr("flashcore.jit.build.compiler_installed", lambda: compiler)
    skipped = command._prepare([SelfTest("both", launch, lambda _: Finding(""))], PRETEND)
    said = capsys.readouterr().out
    assert "2 kernels: 1 from the wheel, 1 not compiled yet" in said
    if compiler:
        assert asked == [([second], 8)]
        assert skipped == []
        assert "1 kernels compiled in" in said
    else:
        assert asked == []
        assert skipped == ["both"]
