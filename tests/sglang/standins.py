"""Stand-ins for what SGLang imports and no test here calls, so that it loads without a GPU.

Its kernels (sgl_kernel), image transforms and notebook output become modules in which every name
exists and whose use says what is missing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

VERSIONS = {"sgl_kernel": "0.4.5", "torchvision": "0.26.0", "IPython": "9.0.0"}


class _Missing(type):
    """A class that can be named, inherited from and asked for attributes, but not made."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{cls.__name__}.{name}", (), {})

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{cls.__name__} is a stand-in of the tests")


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(f"{self.__name__}.{name}", (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> Any:
        if name.partition(".")[0] not in VERSIONS:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__version__ = VERSIONS[module.__name__.partition(".")[0]]


def install() -> None:
    """Put them where the real packages are not installed."""
    for name in list(VERSIONS):
        if importlib.util.find_spec(name) is not None:
            del VERSIONS[name]
    sys.meta_path.append(_Finder())
