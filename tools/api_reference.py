"""Writes docs/reference.md from the public docstrings: python tools/api_reference.py"""

from __future__ import annotations

import inspect
import re
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any

import flashcore

PAGE = Path(__file__).parents[1] / "docs/reference.md"
_ORDER = (
    *("attention", "paged_attention", "plan", "append_kv"),
    *("build_layout", "layout_from_page_table", "layout_from_csr", "Layout", "Plan", "PlanStats"),
    *("DevicePlanner", "DevicePager", "Capacities", "DevicePlan", "DeviceLayout"),
    *("Fault", "Stat", "Count"),
)
_INTRO = """# API reference

Made from the docstrings by `python tools/api_reference.py`. Every error names the argument, the
value and the limit. What each function computes is stated by
[flashcore/reference.py](../flashcore/reference.py), against which all paths are tested.
"""


def page() -> str:
    """The whole page."""
    names = [*_ORDER, *(n for n in flashcore.__all__ if n not in _ORDER and n != "__version__")]
    return "\n".join([_INTRO, *(_entry(name, getattr(flashcore, name)) for name in names)])


def _entry(name: str, thing: Any) -> str:
    if inspect.isclass(thing) and issubclass(thing, (IntEnum, IntFlag)):
        return f"## {name}\n\n```python\n{inspect.getsource(thing)}```\n"
    if not inspect.isclass(thing):
        return f"## {name}\n\n```python\n{_signature(name, thing)}\n```\n\n{_text(thing)}\n"
    parts = [f"## {name}\n"]
    if "__init__" in vars(thing) and not hasattr(thing, "__dataclass_fields__"):
        parts.append(f"```python\n{_signature(name, thing)}\n```\n")
    parts.append(f"{_text(thing)}\n")
    for attribute, value in vars(thing).items():
        if attribute.startswith("_") or not inspect.getdoc(value):
            continue
        if isinstance(value, property):
            parts.append(f"### {name}.{attribute}\n\n{_text(value)}\n")
        elif inspect.isfunction(value) or isinstance(value, staticmethod):
            function = value.__func__ if isinstance(value, staticmethod) else value
            signature = _signature(f"{name}.{attribute}", function)
            parts.append(
                f"### {name}.{attribute}\n\n```python\n{signature}\n```\n\n{_text(value)}\n"
            )
    return "\n".join(parts)


def _signature(name: str, thing: Any) -> str:
    """One line, or a parameter a line where it is longer than 100 characters."""
    found = inspect.signature(thing)
    parameters = [p for p in found.parameters.values() if p.name != "self"]
    found = found.replace(parameters=parameters)
    line = f"{name}{found}".replace("'", "")
    if len(line) <= 100:
        return line
    body = re.sub(r"^\(|\)( -> .*)?$", "", str(found)).replace("'", "")
    returns = "" if found.return_annotation is found.empty else f" -> {found.return_annotation}"
    parts = re.split(r", (?=\*?\*?\w+[:,=]|\*, |\*$)", body)
    return f"{name}(\n    " + ",\n    ".join(parts) + f",\n){returns}"


def _text(thing: Any) -> str:
    """The docstring as it is: what is indented in it reads as text."""
    return f"```text\n{inspect.getdoc(thing)}\n```"


if __name__ == "__main__":
    PAGE.write_text(page())
