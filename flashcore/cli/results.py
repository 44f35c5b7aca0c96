"""What commands that time something have in common: reading, describing and delivering a result."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, TypeVar

from flashcore.cli.files import writing


class _HasName(Protocol):
    @property
    def name(self) -> str: ...


Named = TypeVar("Named", bound=_HasName)


def read_result(path: Path, needed: set[str]) -> dict[str, Any]:
    """A result that --json wrote; ValueError says what is wrong with it."""
    try:
        result: Any = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"--from-json {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"--from-json {path}: {error}") from error
    absent = needed - set(result if isinstance(result, dict) else ())
    if absent:
        raise ValueError(f"--from-json {path}: it has no {', '.join(sorted(absent))}")
    return dict(result)


def head(commit: str | None) -> dict[str, Any]:
    """Of a result: device, driver, versions, commit, date, command."""
    from flashcore.bench.machine import describe_device

    return {**describe_device(), **provenance(commit)}


def provenance(commit: str | None) -> dict[str, Any]:
    """Of a result that no device takes part in: versions, commit, date, command."""
    from flashcore.bench.machine import package_versions, source_commit

    return {
        "versions": package_versions(),
        "commit": commit or source_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        # Folders are the machine's own business.
        "command": shlex.join(["flashcore", *(Path(word).name for word in sys.argv[1:])]),
    }


def deliver(
    args: argparse.Namespace,
    result: dict[str, Any],
    format_table: Callable[[dict[str, Any]], str],
    plot: Callable[[dict[str, Any], Path], None],
) -> int:
    """Print the result, write what was asked for: 0, 1 where nothing was timed."""
    print(f"{result['device']}, driver {result['driver']}, commit {result['commit']}")
    print(format_table(result))
    if args.json is not None:
        with writing(args.json):
            args.json.write_text(json.dumps(result, indent=1) + "\n")
    if args.plot is not None:
        try:
            with writing(args.plot):
                plot(result, args.plot)
        except ImportError:
            return refuse("--plot needs matplotlib: pip install 'flashcore-attention[bench]'")
    return 0 if result["rows"] else 1


def choose(
    names: str, found: Sequence[Named], missing: dict[str, str]
) -> tuple[list[Named], dict[str, str]]:
    """Of the providers found and missing, those that `names` lists by commas.

    Raises KeyError with the first name that is neither.
    """
    wanted = names.split(",")
    known = {*missing, *(provider.name for provider in found)}
    for name in wanted:
        if name not in known:
            raise KeyError(name)
    return (
        [provider for provider in found if provider.name in wanted],
        {name: why for name, why in missing.items() if name in wanted},
    )


def refuse(message: str) -> int:
    """Say why on standard error: 2."""
    print(f"flashcore bench: {message}", file=sys.stderr)
    return 2


def positive(text: str) -> int:
    """argparse type: an integer of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number
