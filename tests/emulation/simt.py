"""Runs the source of device functions on the host, all threads of a warp or CTA side by side.

A module's functions are read, not imported: `if`, `while`, conditional expressions and assignments
under them become masked operations on arrays with an element for each thread, and the names of the
DSL are those below. What is run is the text of the kernels; what the DSL, ptxas and the GPU make of
it is not looked at. Products of a sum are rounded as `fma` and `mul` say; exp2, log2 and the
reciprocal are numpy's.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

Lanes = Any  # an array with an element for each thread, or a number that all have
KERNELS = "flashcore.sm90.kernels"
_masks: list[Any] = []


class Float32(np.float32):
    inf = np.float32(np.inf)


def active() -> Lanes:
    """Which threads execute; True for all."""
    return _masks[-1] if _masks else True


def push(condition: Lanes) -> bool:
    """Only threads of `condition` go on; whether there are any."""
    _masks.append(np.logical_and(active(), condition))
    return bool(np.any(_masks[-1]))


def pop() -> None:
    _masks.pop()


def blend(new: Any, old: Any = None) -> Any:
    """`new` in threads that execute, else `old`."""
    mask = active()
    if mask is True or old is None or np.all(mask):
        return new
    if isinstance(new, tuple):
        return tuple(blend(*pair) for pair in zip(new, old, strict=True))
    return select(mask, new, old) if _is_value(new) else new


def select(condition: Lanes, yes: Any, no: Any) -> Any:
    if isinstance(condition, (bool, np.bool_)):
        return yes if condition else no
    dtype = np.result_type(*(x for x in (yes, no) if isinstance(x, (np.ndarray, np.generic))))
    if not any(isinstance(x, (np.ndarray, np.generic)) for x in (yes, no)):
        dtype = np.int32
    return np.where(condition, yes, no).astype(dtype)


def _is_value(x: Any) -> bool:
    return isinstance(x, (int, float, np.ndarray, np.generic))


def uniform(x: Lanes) -> int:
    """The number that all threads that execute have."""
    if isinstance(x, np.ndarray):
        found = np.unique(np.broadcast_to(x, np.shape(active()) or x.shape)[active()])
        assert len(found) == 1, f"threads differ: {found}"
        return int(found[0])
    return int(x)


def dynamic_range(*bounds: Lanes, unroll: int = 1, **_: Any) -> range:
    return range(*(uniform(x) for x in bounds))


def _extreme(numpy: Any, plain: Any) -> Any:
    def least_or_most(*values: Any, **options: Any) -> Any:
        if options or len(values) == 1 or not any(isinstance(x, np.ndarray) for x in values):
            return plain(*values, **options)
        found = values[0]
        for other in values[1:]:
            found = numpy(found, other)
        return found

    return least_or_most


class Registers:
    """A register tensor: of each thread its own."""

    def __init__(self, data: np.ndarray):
        self.data, self.shape = data, data.shape[:-1]

    def _place(self, index: Any) -> tuple[Any, ...]:
        places = index if isinstance(index, tuple) else (index,)
        return tuple(slice(None) if i is None else uniform(i) for i in places)

    def __getitem__(self, index: Any) -> Any:
        found = self.data[self._place(index)]
        return found.copy() if found.ndim == 1 else Registers(found)

    def __setitem__(self, index: Any, value: Any) -> None:
        place = self._place(index)
        self.data[place] = np.where(active(), value, self.data[place])

    def fill(self, value: Any) -> None:
        self.data[:] = np.where(active(), value, self.data)


class Memory:
    """A tensor in shared or global memory, or a part that begins at a place of each thread."""

    def __init__(self, data: np.ndarray, shape: tuple[int, ...], strides: Any, start: Lanes = 0):
        self.data, self.shape, self.strides, self.start = data, shape, strides, start
        self.element_type = SimpleNamespace(width=8 * data.itemsize)

    @staticmethod
    def of(array: np.ndarray) -> Memory:
        strides = tuple(s // array.itemsize for s in array.strides)
        return Memory(array.reshape(-1), array.shape, strides)

    @property
    def iterator(self) -> Pointer:
        return Pointer(self.data, self.start)

    def _split(self, index: Any) -> tuple[Lanes, list[int]]:
        places = index if isinstance(index, tuple) else (index,)
        at, kept = self.start, []
        for axis, (i, size) in enumerate(zip(places, self.shape, strict=True)):
            if i is None:
                kept.append(axis)
                continue
            bad = np.logical_and(active(), np.logical_or(i < 0, i >= size))
            assert not np.any(bad), f"index {i} of {size}"
            at = at + i * self.strides[axis]
        return at, kept

    def __getitem__(self, index: Any) -> Any:
        at, kept = self._split(index)
        if kept:
            shape, strides = (tuple(x[axis] for axis in kept) for x in (self.shape, self.strides))
            return Memory(self.data, shape, strides, at)
        return self.data[np.where(active(), at, 0)]

    def __setitem__(self, index: Any, value: Any) -> None:
        at, kept = self._split(index)
        assert not kept
        mask = np.broadcast_to(active(), np.broadcast(at, value, active()).shape)
        at, value = (np.broadcast_to(x, mask.shape) for x in (at, value))
        self.data[at[mask]] = value[mask]


class Pointer:
    def __init__(self, data: np.ndarray, at: Lanes):
        self.data, self.at = data, at

    def __add__(self, offset: Lanes) -> Pointer:
        return Pointer(self.data, self.at + offset)

    def align(self, size: int) -> Pointer:
        assert np.all((self.at * self.data.itemsize % size == 0) | ~np.asarray(active()))
        return self


def _tensor(pointer: Pointer, layout: Any) -> Memory:
    shape, strides = layout
    return Memory(pointer.data, shape, strides, pointer.at)


def _layout(shape: Any, stride: Any = None) -> Any:
    shape = shape if isinstance(shape, tuple) else (shape,)
    if stride is None:
        stride = tuple(int(np.prod(shape[:i])) for i in range(len(shape)))
    return shape, stride


def _copy(source: Any, target: Any) -> None:
    for i in range(int(np.prod(source.shape))):
        target[i] = source[i]


def _size(tensor: Any, mode: Any = None) -> int:
    return int(np.prod(tensor.shape)) if mode is None else int(tensor.shape[mode[0]])


def _instruction(text: str, operands: tuple[Lanes, ...], loc: Any, ip: Any) -> Lanes:
    """Of PTX, rounded as it says; a fused sum is rounded twice, once to 53 bits."""
    name, values = text.split()[0], [np.float32(x) for x in operands]
    if name == "mul.rn.f32":
        return values[0] * values[1]
    assert name == "fma.rn.f32"
    a, b, c = (np.float64(x) for x in values)
    return np.float32(a * b + c)


class Machine:
    """Threads that run together: `lanes` are their numbers in the CTA."""

    def __init__(self, threads: int, first: int = 0, block: int = 0):
        self.lanes, self.block = np.arange(first, first + threads, dtype=np.int32), block
        self.modules: dict[str, Any] = {}
        self.names = self._names()

    def shuffle(self, x: Lanes, source: Lanes) -> Lanes:
        x, source = (np.broadcast_to(v, self.lanes.shape).reshape(-1, 32) for v in (x, source))
        return np.take_along_axis(x, source, 1).reshape(-1)

    def by_warp(self, reduce: Any, x: Lanes) -> Lanes:
        x = np.broadcast_to(x, self.lanes.shape).reshape(-1, 32)
        return np.repeat(reduce(x, axis=1), 32)

    def registers(self, shape: Any, dtype: Any) -> Registers:
        shape = shape if isinstance(shape, tuple) else (shape,)
        kind = np.int32 if dtype is np.int32 else np.float32
        return Registers(np.zeros((*shape, len(self.lanes)), kind))

    def allocator(self) -> Any:
        def allocate_tensor(dtype: Any, layout: Any, byte_alignment: int = 1) -> Memory:
            size = 1 + sum((n - 1) * s for n, s in zip(*layout, strict=True))
            return Memory(np.full(size, np.nan, np.float32), *layout)

        return SimpleNamespace(allocate_tensor=allocate_tensor)

    def load(self, name: str) -> Any:
        """A module of the kernels, by its name below them."""
        if name not in self.modules:
            path = Path(importlib.util.find_spec(f"{KERNELS}.{name}").origin)  # type: ignore[union-attr,arg-type]
            tree = _Masked(self, name).visit(ast.parse(path.read_text()))
            module = ModuleType(name)
            self.modules[name] = module
            module.__dict__.update(self.names)
            exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), module.__dict__)
            if hasattr(module, "_instruction"):  # of parts.fold
                module._instruction = _instruction  # type: ignore[attr-defined]
        return self.modules[name]

    def _names(self) -> dict[str, Any]:
        np.seterr(all="ignore")
        arch = SimpleNamespace(
            fmax=lambda a, b: np.fmax(np.float32(a), np.float32(b)),
            rcp_approx=lambda x: np.float32(1) / np.float32(x),
            shuffle_sync=self.shuffle,
            shuffle_sync_bfly=lambda x, mask: self.shuffle(
                x, np.broadcast_to(self.lanes % 32 ^ mask, self.lanes.shape)
            ),
            vote_any_sync=lambda x: self.by_warp(np.any, x),
            warp_redux_sync=lambda x, kind: self.by_warp(getattr(np, kind), x),
            thread_idx=lambda: (self.lanes, 0, 0),
            block_idx=lambda: (self.block, 0, 0),
            warp_idx=lambda: self.lanes // 32,
            lane_idx=lambda: self.lanes % 32,
            make_warp_uniform=lambda x: x,
            griddepcontrol_wait=lambda: None,
            sync_threads=lambda: None,
        )
        math = SimpleNamespace(
            exp2=lambda x, fastmath: np.exp2(np.float32(x)),
            log2=lambda x, fastmath: np.log2(np.float32(x)),
        )
        cute = SimpleNamespace(
            arch=arch, math=math, make_rmem_tensor=self.registers, make_tensor=_tensor,
            make_layout=_layout, autovec_copy=_copy, size=_size,
            ceil_div=lambda a, b: -(-a // b), recast_tensor=lambda tensor, dtype: tensor,
        )  # fmt: skip
        cutlass = SimpleNamespace(range=dynamic_range, range_constexpr=range)
        return {
            "cute": cute, "cutlass": cutlass, "Float32": Float32, "Int32": np.int32,
            "Boolean": lambda x: x, "BFloat16": "bf16", "Float16": "fp16",
            "const_expr": lambda x: x, "SmemAllocator": self.allocator,
            "min": _extreme(np.minimum, min), "max": _extreme(np.maximum, max),
            "_blend": blend, "_select": select, "_push": push, "_pop": pop,
            "_and": np.logical_and, "_or": np.logical_or, "_not": np.logical_not, "_to": _to,
        }  # fmt: skip

    def imported(self, module: str, name: str) -> Any:
        """What a module of the kernels gets for a name that it imports."""
        below = module.removeprefix(KERNELS).lstrip(".")
        if f"{below}.{name}" in self.modules or _is_module(f"{module}.{name}"):
            return self.load(f"{below}.{name}")
        return getattr(self.load(below), name)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _to(value: Lanes, dtype: Any) -> Lanes:
    """Rounded to 16 bits, as a float."""
    import torch

    if dtype not in ("bf16", "fp16"):
        return np.float32(value)
    kind = torch.bfloat16 if dtype == "bf16" else torch.float16
    return torch.from_numpy(np.atleast_1d(np.float32(value))).to(kind).float().numpy()


class _Masked(ast.NodeTransformer):
    """The rules above."""

    def __init__(self, machine: Machine, name: str):
        self.machine, self.name, self.depth = machine, name, 0

    def visit_Import(self, node: ast.Import) -> Any:
        return None if node.names[0].name.startswith("cutlass") else node

    def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
        module = node.module or ""
        if module.startswith("cutlass"):
            return None
        if not module.startswith(KERNELS):
            return node
        statements = []
        for alias in node.names:
            if alias.name not in self.machine.names:
                value = self.machine.imported(module, alias.name)
                self.machine.names[f"_import_{self.name}_{alias.name}".replace(".", "_")] = value
                held = f"_import_{self.name}_{alias.name}".replace(".", "_")
                target = ast.Name(alias.asname or alias.name, ast.Store())
                statements.append(ast.Assign([target], ast.Name(held, ast.Load())))
        return statements

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        node.decorator_list = [
            d
            for d in node.decorator_list
            if isinstance(d, ast.Name) and d.id in ("staticmethod", "property")
        ]
        depth, self.depth = self.depth, 0
        self.generic_visit(node)
        self.depth = depth
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        if _is_static(node):
            return node
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to" and len(node.args) == 1:
            return _call("_to", node.func.value, node.args[0])
        return node

    def visit_IfExp(self, node: ast.IfExp) -> Any:
        self.generic_visit(node)
        return (
            node if _is_static(node.test) else _call("_select", node.test, node.body, node.orelse)
        )

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        self.generic_visit(node)
        found, name = node.values[0], "_and" if isinstance(node.op, ast.And) else "_or"
        for value in node.values[1:]:
            found = _call(name, found, value)
        return found

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        self.generic_visit(node)
        return _call("_not", node.operand) if isinstance(node.op, ast.Not) else node

    def visit_If(self, node: ast.If) -> Any:
        if _is_static(node.test) or not isinstance(node.test, ast.expr):
            self.generic_visit(node)
            return node
        test = self.visit(node.test)
        self.depth += 1
        body, orelse = ([self.visit(s) for s in part] for part in (node.body, node.orelse))
        self.depth -= 1
        held = ast.Name(f"_if_{node.lineno}", ast.Store())
        read = ast.Name(held.id, ast.Load())
        pop = ast.Expr(_call("_pop"))
        found: list[Any] = [ast.Assign([held], test)]
        found += [ast.If(_call("_push", read), _flat(body), []), pop]
        if orelse:
            found += [ast.If(_call("_push", _call("_not", read)), _flat(orelse), []), pop]
        return found

    def visit_While(self, node: ast.While) -> Any:
        test = self.visit(node.test)
        self.depth += 1
        body = [self.visit(s) for s in node.body]
        self.depth -= 1
        pop = ast.Expr(_call("_pop"))
        leave = ast.If(_call("_not", _call("_push", test)), [pop, ast.Break()], [])
        return ast.While(ast.Constant(True), [leave, *_flat(body), pop], [])

    def visit_Assign(self, node: ast.Assign) -> Any:
        self.generic_visit(node)
        (target,) = node.targets
        if self.depth == 0 or not _names_of(target):
            return node
        held = ast.Name("_new", ast.Store())
        found: list[Any] = [ast.Assign([held], node.value)]
        if isinstance(target, ast.Name):
            found.append(ast.Assign([target], _blended(target.id, ast.Name("_new", ast.Load()))))
            return found
        assert isinstance(target, ast.Tuple)
        found.append(ast.Assign([held], _call("list", ast.Name("_new", ast.Load()))))
        for i, one in enumerate(target.elts):
            value = ast.Subscript(ast.Name("_new", ast.Load()), ast.Constant(i), ast.Load())
            blended = _blended(one.id, value) if isinstance(one, ast.Name) else value
            found.append(ast.Assign([one], blended))
        return found

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        read = ast.parse(ast.unparse(node.target), mode="eval").body
        return self.visit(ast.Assign([node.target], ast.BinOp(read, node.op, node.value)))


def _is_static(node: ast.AST) -> bool:
    """Decided while a kernel is compiled."""
    called = node.func if isinstance(node, ast.Call) else None
    return isinstance(called, ast.Name) and called.id in ("const_expr", "isinstance")


def _names_of(target: ast.expr) -> bool:
    parts = target.elts if isinstance(target, ast.Tuple) else [target]
    return any(isinstance(part, ast.Name) for part in parts)


def _blended(name: str, value: ast.expr) -> ast.Call:
    old = ast.parse(f"locals().get({name!r})", mode="eval").body
    return _call("_blend", value, old)


def _call(name: str, *arguments: Any) -> ast.Call:
    return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])


def _flat(statements: list[Any]) -> list[Any]:
    return [s for one in statements for s in (one if isinstance(one, list) else [one])]
