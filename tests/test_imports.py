"""The house: which stage may import which, read from the sources, imports inside functions too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flashcore"

# From the ground up: a module imports those of its own floor and of floors below.
FLOORS = (
    ("contract", "validate", "kv_checks", "remembered", "tree", "problem", "names"),
    ("triton_compiler", "expand_kernel"),
    ("jit",),
    ("dispatch",),  # finds providers by name
    ("pager",),
    ("planner",),
    ("expand_plan_kernel",),
    ("eager",),
    ("sm90",),
    ("ops", "checks"),
    ("one_off",),
    ("api", "append", "append_kernel", "reference", "reference_fold"),
    ("",),  # the package's own names, loaded on first use
    ("serving",),
    ("integrations",),
    ("bench",),
    ("replay",),
    ("cli",),
    ("__main__",),
)
# Within Hopper's wing, and within kernels.
WING = ("config", "kernels", "compile", "families", "shipped", "needed", "available", "launch")
MOST_LINES = 500
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts).removesuffix("__init__").rstrip(".")] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports, but for types alone."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flashcore":
            package = (node.module or "").removeprefix("flashcore").lstrip(".")
            for alias in node.names:
                name = f"{package}.{alias.name}".lstrip(".")
                yield name if name in MODULES else package
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "flashcore":
                    yield alias.name.removeprefix("flashcore").lstrip(".")
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    yield from visit(ast.parse(path.read_text()))


GRAPH = {name: set(imports(path)) for name, path in MODULES.items() if name}


def test_every_room_has_its_floor() -> None:
    assert {name.split(".")[0] for name in MODULES} == set(LEVEL)
    assert {used for uses in GRAPH.values() for used in uses} <= set(MODULES)


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_no_arrow_runs_up(name: str) -> None:
    floor = LEVEL[name.split(".")[0]]
    assert {used for used in GRAPH[name] if LEVEL[used.split(".")[0]] > floor} == set()


def test_no_circle() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize("name", sorted(name for name in GRAPH if name.startswith("sm90.")))
def test_hopper_s_wing_has_floors_of_its_own(name: str) -> None:
    def level(module: str) -> int:
        room = module.split(".")[1]
        return WING.index(room) if room in WING else len(WING)

    used = {used for used in GRAPH[name] if used.startswith("sm90.")}
    assert {other for other in used if level(other) > level(name)} == set()


@pytest.mark.parametrize("folder", ["flashcore", "tests", "tools", "benchmarks", "examples"])
def test_no_file_has_more_lines_than_can_be_read_at_a_sitting(folder: str) -> None:
    long = {
        str(path.relative_to(PACKAGE.parent)): lines
        for path in (PACKAGE.parent / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert long == {}


def test_kernels_and_the_contract_never_import_torch() -> None:
    for name, path in MODULES.items():
        if name.startswith(("sm90.kernels", "sm90.config", "contract")):
            tree = ast.walk(ast.parse(path.read_text()))
            named = [
                alias.name if isinstance(node, ast.Import) else node.module or ""
                for node in tree
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for alias in node.names
            ]
            assert not [n for n in named if n.split(".")[0] == "torch"], name
            if not name.startswith("sm90.kernels"):
                assert not [n for n in named if n.split(".")[0] in ("cutlass", "tvm_ffi")], name


# ---------------------------------------------------------------- errors on the way of a call

ROOTS = ("api", "append", "pager", "planner", "serving", "integrations", "sm90.device_p")


def reached(roots: tuple[str, ...]) -> set[str]:
    """Modules that those whose names begin so import, and what these import."""
    found: set[str] = set()
    waiting = [name for name in GRAPH if name.startswith(roots)]
    while waiting:
        name = waiting.pop()
        if name and name not in found:
            found.add(name)
            waiting.extend(GRAPH[name])
    return found


def broad_handlers(source: str) -> list[int]:
    """Lines that take whatever error there is, and do not raise it again."""
    every, found = {"Exception", "BaseException"}, []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = re.findall(r"\w+", ast.unparse(node.type) if node.type else "BaseException")
            broad = not isinstance(node.body[-1], ast.Raise)
        elif isinstance(node, ast.Call):
            caught = [ast.unparse(argument) for argument in node.args]
            broad = ast.unparse(node.func).endswith("suppress")
        else:
            continue
        if broad and every & set(caught):
            found.append(node.lineno)
    return found


def test_no_error_is_passed_over_on_the_way_of_a_call() -> None:
    way = reached(ROOTS)
    assert {"jit.load", "jit.build", "sm90.launch.paged", "eager.run", "serving.views"} <= way
    found = {name: broad_handlers(MODULES[name].read_text()) for name in way}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("try: f()\nexcept Exception: pass", 1),
        ("try: f()\nexcept (ValueError, BaseException) as e: g(e)", 1),
        ("try: f()\nexcept: pass", 1),
        ("with contextlib.suppress(Exception): f()", 1),
        ("try: f()\nexcept BaseException:\n  g()\n  raise", 0),
        ("try: f()\nexcept ValueError: pass", 0),
    ],
)
def test_what_counts_as_passing_over(source: str, count: int) -> None:
    assert len(broad_handlers(source)) == count
