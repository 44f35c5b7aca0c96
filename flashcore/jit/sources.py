"""Which sources decide what a compile function makes: its module and all that this imports.

    "flashcore.sm90.compile.pager" ─► imports, and theirs ─► files ─► digest

Imports are found by reading, wherever they stand in a file; only those of the module's own top
package are followed, since the versions of others are part of the target.
"""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path

_FROM = re.compile(
    r"^[ \t]*from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n]+)", re.MULTILINE
)
_IMPORT = re.compile(r"^[ \t]*import[ \t]+([^\n]+)", re.MULTILINE)
_NAME = re.compile(r"^\s*([\w.]+)", re.MULTILINE)


@lru_cache(maxsize=32)
def source_digest(module: str, root: Path) -> str:
    """sha256 over names and contents of `source_files`; read once per process."""
    digest = hashlib.sha256()
    for file in source_files(module, root):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def source_files(module: str, root: Path) -> list[Path]:
    """The files of `module` and of every module of its top package that it needs, sorted.

    root: the folder that holds the top package. The `__init__.py` of packages on the way count, but
    that of the top package, which is the user's interface. Raises FileNotFoundError where there is
    no such module, ValueError for a relative import, which would be left out.
    """
    top = module.partition(".")[0]
    found: dict[str, Path] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name in found or name == top:
            continue
        file = _file_of(name, root)
        if file is None:
            if name == module:
                raise FileNotFoundError(f"there is no module {module} in {root}")
            continue  # a name in a module, not a module
        found[name] = file
        pending.append(name.rpartition(".")[0])
        pending += [used for used in _imports(file) if used.startswith(f"{top}.")]
    return sorted(found.values())


def _file_of(module: str, root: Path) -> Path | None:
    place = root.joinpath(*module.split("."))
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            return file
    return None


def _imports(file: Path) -> list[str]:
    """Dotted names that `file` imports: modules, and names in them, which may be modules too."""
    text = file.read_text()
    names = []
    for package, imported in _FROM.findall(text):
        if package.startswith("."):
            raise ValueError(f"{file}: the relative import from {package} is not followed")
        listed = [part for line in imported.splitlines() for part in line.strip("() ").split(",")]
        used = [match[1] for part in listed if (match := _NAME.match(part))]
        names += [package, *(f"{package}.{name}" for name in used)]
    for imported in _IMPORT.findall(text):
        names += [match[1] for part in imported.split(",") if (match := _NAME.match(part))]
    return names
