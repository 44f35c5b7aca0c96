"""Calls of a command of the command line, and what it says when it refuses."""

from __future__ import annotations

import argparse
from typing import Any

import pytest


def parse(command: Any, *words: str) -> argparse.Namespace:
    """The arguments of `command`, a module with `add_arguments` and `run`."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def assert_refused(
    command: Any,
    arguments: argparse.Namespace,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It returns 2 and says why on standard error."""
    assert command.run(arguments) == 2
    assert message in capsys.readouterr().err
