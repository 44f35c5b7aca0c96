"""`flashcore COMMAND`: picks the command's module and turns expected failures into one line."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module

import flashcore
from flashcore.cli.parser import Parser

COMMANDS = {
    "demo": ("flashcore.cli.demo", "a batch with a shared prefix, read once and per sequence"),
    "replay": ("flashcore.cli.replay", "how much a real trace's batches share"),
    "info": ("flashcore.cli.info", "versions, devices, and which path each one takes"),
    "compile": ("flashcore.cli.compile_cmd", "fill the kernel cache ahead of time"),
    "check": (
        "flashcore.cli.check.command",
        "self-test of this installation: kernels, or torch operators",
    ),
    "bench": ("flashcore.cli.bench", "our kernels beside every peer that is installed"),
}


def parser_for(command: str | None) -> argparse.ArgumentParser:
    """The parser; only the named command's module is imported, so that help stays quick."""
    parser = Parser(
        prog="flashcore",
        description="Attention for LLM serving that reads each shared KV page once per batch.",
    )
    parser.add_argument("--version", action="version", version=f"flashcore {flashcore.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        sub = commands.add_parser(name, help=summary, description=summary)
        if name == command:
            home = import_module(module)
            home.add_arguments(sub)
            sub.set_defaults(run=home.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status: 0, 1 for a failed check, 2 for bad input, 130 after
    an interrupt."""
    argv = sys.argv[1:] if argv is None else argv
    command = next((word for word in argv if not word.startswith("-")), None)
    name = f"flashcore {command}" if command in COMMANDS else "flashcore"
    try:
        try:
            args = parser_for(command).parse_args(argv)
            status = int(args.run(args))
        except SystemExit as done:  # argparse, after help or an error
            status = int(done.code or 0)
        if sys.stdout is not None:  # it is where the program was started without one
            sys.stdout.flush()  # here, where a full disk is still ours to tell
        return status
    except (ValueError, TypeError, NotImplementedError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader went away (`flashcore demo | head`): no more to say
        _drop_output()
        return 0
    except OSError as error:
        _drop_output()
        where = "" if error.filename is None else f": {error.filename}"
        print(f"{name}: {error.strerror or error}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def _drop_output() -> None:
    """No traceback from the interpreter's own flush at exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
