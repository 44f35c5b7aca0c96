"""Files that a command writes: what would fail is found before the long work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def prepare_output(option: str, path: Path | None, inputs: Sequence[str | Path | None]) -> None:
    """Make the folder that `path` will lie in; None is no output.

    Raises ValueError where no file can be written there, and where it would replace one of
    `inputs`.
    """
    if path is None:
        return
    with _named(option, path):
        if path.is_dir():
            raise ValueError(f"{option} {path}: it is a folder; a file name is needed")
        path.parent.mkdir(parents=True, exist_ok=True)
    for one in inputs:
        if one is not None and _same_file(path, Path(one)):
            raise ValueError(f"{option} {path}: it would replace the input; name another file")


def prepare_folder(option: str, path: Path) -> None:
    """Make the folder `path`; ValueError where that cannot be."""
    with _named(option, path):
        path.mkdir(parents=True, exist_ok=True)


@contextmanager
def _named(option: str, path: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError as error:
        raise ValueError(f"{option} {path}: {error.filename} is no folder") from error
    except OSError as error:
        raise ValueError(f"{option} {path}: cannot be written: {error.strerror}") from error


def _same_file(path: Path, other: Path) -> bool:
    if path.exists() and other.exists():
        return path.samefile(other)
    return path.resolve() == other.resolve()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError, such as a full disk, into a ValueError that names `path`."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
