"""A kernel before it is compiled: its family and its configuration, and the key they give.

A family says how its kernels are compiled and which sources decide what comes out. Adding a kernel
to the library means adding a family; cache, loader and gates need not know it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from flashcore.config.paged import PagedConfig
from flashcore.runtime.target import Target

_PACKAGE = Path(__file__).resolve().parents[1]
_FORMAT = 2  # of a cache entry; raise it when entry.py or the way of linking changes


@dataclass(frozen=True)
class Family:
    """All kernels that one compile function makes from one kind of configuration."""

    name: str  # part of symbols and file names: letters, digits, underscores
    compiler: str  # "module:function"; takes a configuration and the DSL's options, no tensor
    sources: tuple[str, ...]  # files and folders that decide the code, relative to the package
    required_opcodes: tuple[str, ...] = ("HGMMA", "UTMALDG")  # or the kernel is not what it says
    root: Path = _PACKAGE
    opcodes_of: Callable[[Any], tuple[str, ...]] | None = None  # where the configuration decides

    def resolve_compiler(self) -> Callable[..., Any]:
        """Import the compile function. This imports the CuTe DSL, so only a cache miss does it."""
        module, _, function = self.compiler.partition(":")
        resolved: Callable[..., Any] = getattr(import_module(module), function)
        return resolved


DENSE = Family(
    name="dense",
    compiler="flashcore.runtime.compile:compile_dense",
    sources=("kernels", "config", "runtime/compile.py"),
)
_PAGED_SOURCES = (
    *DENSE.sources,
    "planner/work.py",
    "pager/counters.py",
    "planner/counters.py",
    "runtime/compile_paged.py",
)


def _paged_opcodes(config: PagedConfig) -> tuple[str, ...]:
    """Q is always gathered by LDGSTS; what signals a stage shows how K and V come."""
    if config.kv_load == "gather":
        return ("HGMMA", "LDGSTS.E.BYPASS.128", "ARRIVES.LDGSTSBAR")
    return ("HGMMA", "UTMALDG")


PAGED = Family(
    "paged",
    "flashcore.runtime.compile_paged:compile_paged",
    _PAGED_SOURCES,
    opcodes_of=_paged_opcodes,
)
COMBINE = Family(
    "combine", "flashcore.runtime.compile_paged:compile_combine", _PAGED_SOURCES, ("LDG",)
)
_PLAN_SOURCES = (
    "planner/split.py",
    "kernels",
    "config",
    "planner/work.py",
    "planner/counters.py",
    "pager/counters.py",
    "runtime/compile.py",
)
PLANNER = Family(
    "planner",
    "flashcore.runtime.compile_planner:compile_planner",
    (*_PLAN_SOURCES, "runtime/compile_planner.py"),
    required_opcodes=("REDG", "SHFL"),
)
PAGER = Family(
    "pager",
    "flashcore.runtime.compile_pager:compile_pager",
    (*_PLAN_SOURCES, "runtime/compile_pager.py"),
    required_opcodes=("SHFL",),
)


@dataclass(frozen=True)
class Kernel:
    """One kernel to compile: a family and a frozen dataclass with every compile-time decision."""

    family: Family
    config: Any

    @property
    def required_opcodes(self) -> tuple[str, ...]:
        """Opcodes without which the compiled kernel is not what its configuration says."""
        of = self.family.opcodes_of
        return self.family.required_opcodes if of is None else of(self.config)

    def key(self, target: Target) -> str:
        """Hex sha256 of everything that can change the compiled code."""
        ingredients = {
            "format": _FORMAT,
            "family": [self.family.name, self.family.compiler],
            "config": [type(self.config).__qualname__, asdict(self.config)],
            "sources": source_digest(self.family.root, self.family.sources),
            "target": asdict(target),
        }
        text = json.dumps(ingredients, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def describe(self) -> str:
        """The configuration on one line, fields at their default left out."""
        words = []
        for field in fields(self.config):
            value = getattr(self.config, field.name)
            if value == field.default:
                continue
            switch = field.name if value else f"no {field.name}"
            words.append(switch if isinstance(value, bool) else f"{field.name}={value}")
        return " ".join([self.family.name, *words])


def symbol_of(kernel: Kernel, key: str) -> str:
    """Name of the exported function. Unique per key: many kernels live in one process."""
    return f"flashcore_{kernel.family.name}_{key[:16]}"


@lru_cache(maxsize=32)
def source_digest(root: Path, sources: tuple[str, ...]) -> str:
    """sha256 over names and contents of the Python files in `sources`; read once per process."""
    digest = hashlib.sha256()
    for source in sources:
        path = root / source
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        for file in files:
            content = file.read_bytes()
            digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()
