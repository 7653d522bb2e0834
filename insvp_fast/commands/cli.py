"""The command ``insvp``: a thin parser over ``insvp_fast.commands``.

Torch is imported when a command runs, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from insvp_fast import __version__
from insvp_fast.errors import CommandError

__all__ = ["main"]

# each is a module of insvp_fast.commands with SUMMARY, add_arguments(parser) and run(**options) -> exit status
COMMANDS = ("train", "eval", "predict", "recipes", "data", "sweep", "info", "convert", "doctor", "bench")
MODULES = {"eval": "evaluate"}  # where the name is Python's
EXTRAS = ("accelerate", "sklearn", "matplotlib", "tqdm")  # what the extra `train` installs, as imported
INTERRUPTED = 130  # what a shell reports for Ctrl-C


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for failed work, 2 for a wrong argument, or 130 for Ctrl-C."""
    # read when torch is loaded: threads that spin while they wait make training several times slower on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        return command(**options)
    except CommandError as error:
        print(f"insvp: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:  # which may know what is left to go on from
        print("; ".join(["insvp: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `insvp predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes
        return 1
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        print(f"insvp: error: {error.name} is not installed: pip install 'insvp-fast[train]'", file=sys.stderr)
        return 1


def _parser() -> Parser:
    parser = Parser(
        prog="insvp",
        description="Adapt a frozen Vision Transformer with instance visual prompts (InsVP).",
        epilog="`insvp COMMAND --help` explains a command; `insvp train` alone adapts a small model to digits.",
    )
    parser.add_argument("--version", action="version", version=f"insvp {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"insvp_fast.commands.{MODULES.get(name, name)}")
        command = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        command.set_defaults(command=module.run)
        module.add_arguments(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
