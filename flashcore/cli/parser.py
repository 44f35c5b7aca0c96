"""Parsers whose errors are one line, by the command that they belong to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's, without its usage before every error: of some commands that is half a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's passes over a full disk."""
        if file is not None:
            file.write(message)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[Any, list[str]]:
        """What nothing takes is an error of the command that it was given to."""
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return found, rest


def device_name(text: str) -> str:
    """argparse type: a device that torch has a name for; whether it is there is seen in its use."""
    import torch

    try:
        torch.device(text)
    except RuntimeError:  # with a list of all that there may ever be
        raise argparse.ArgumentTypeError(
            f"must be a device such as 'cpu', 'cuda' or 'cuda:1', got {text!r}"
        ) from None
    return text
