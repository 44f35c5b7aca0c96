"""A kernel before it is compiled: its family and its configuration, and the key they give.

A family says how its kernels are compiled. Adding a kernel to the library means adding a family;
cache, loader and gates need not know it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from flashcore.jit.sources import source_digest
from flashcore.jit.target import Target

_ROOT = Path(__file__).resolve().parents[2]  # holds the package
_FORMAT = 2  # of a cache entry; raise it when entry.py or the way of linking changes


@dataclass(frozen=True)
class Family:
    """All kernels that one compile function makes from one kind of configuration."""

    name: str  # part of symbols and file names: letters, digits, underscores
    compiler: str  # "module:function"; takes a configuration and the DSL's options, no tensor
    required_opcodes: tuple[str, ...] = ("HGMMA", "UTMALDG")  # or the kernel is not what it says
    root: Path = _ROOT  # the folder that holds the top package of `compiler`
    opcodes_of: Callable[[Any], tuple[str, ...]] | None = None  # where the configuration decides

    @property
    def module(self) -> str:
        """Of the compile function."""
        return self.compiler.partition(":")[0]

    def resolve_compiler(self) -> Callable[..., Any]:
        """Import the compile function. This imports the CuTe DSL, so only a cache miss does it."""
        module, _, function = self.compiler.partition(":")
        resolved: Callable[..., Any] = getattr(import_module(module), function)
        return resolved


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
            "sources": source_digest(self.family.module, self.family.root),
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
