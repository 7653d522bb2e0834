"""The command ``insvp``: a thin parser over the modules of ``insvp_fast.commands``.

torch is imported only when a command runs, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

from insvp_fast import __version__
from insvp_fast.commands.completion import PrintCompletion
from insvp_fast.commands.settings import show_options
from insvp_fast.errors import INTERRUPTED, InsVPError, InsVPWarning

__all__ = ["COMMANDS", "main", "run"]

COMMANDS = (
    "train",
    "eval",
    "predict",
    "prompts",
    "tsne",
    "report",
    "demo",
    "serve",
    "export",
    "recipes",
    "methods",
    "data",
    "sweep",
    "paper",
    "info",
    "convert",
    "doctor",
    "bench",
)
MODULES = {"eval": "evaluate"}  # for commands whose modules have other names
EXTRAS = {  # which one installs a package, by the name of its import
    **dict.fromkeys(("accelerate", "sklearn", "matplotlib", "rich", "shtab", "jinja2"), "train"),
    "pyarrow": "parquet",
    "gradio": "demo",
    **dict.fromkeys(("starlette", "uvicorn", "python_multipart", "prometheus_client"), "serve"),
}

_warned: set[str] = set()  # the lines of ``_show_warning``
_statuses: list[int] = []  # the exit status of ``run``, when it is known


@atexit.register  # before torch is imported, so that it is called after all that torch's packages have registered
def _end_at_once() -> None:
    """End the process of ``run``, which would look a second longer for garbage in all that torch has loaded."""
    if _statuses:
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None: was closed when the process began
            stream.flush()
        os._exit(_statuses.pop())


class Parser(argparse.ArgumentParser):
    """A parser whose error messages are one line, without the usage; options are given by their whole names."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)  # an option added later would change what --see means

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 1 for failure, 2 for invalid arguments, 130 for Ctrl-C."""
    # OpenMP reads it when torch is loaded: threads that spin while they wait slow training down on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: names of files may be no UTF-8
    try:
        options = vars(_parser().parse_args(arguments))
        command, as_json = options.pop("command"), options.pop("json", False)
        with _everything_to_stderr() if as_json and sys.stdout else nullcontext():
            result = command(**options)
        if as_json and result is not None:
            print(json.dumps(result, default=str))
        errors = (result or {}).get("errors", ())
        for error in errors:
            print(f"insvp: error: {error}", file=sys.stderr)
        print(end="", flush=True)  # here, where its errors are caught
        return 1 if errors else 0
    except InsVPError as error:
        print(f"insvp: error: {_in_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:  # its arguments may say how to resume
        message = "; ".join(["interrupted", *map(str, interrupt.args)])
        print(f"insvp: {show_options(message)}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `insvp predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports it again at exit
        return 1
    except OSError as error:  # a disk that is full, a folder that must not be written
        print(f"insvp: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        extra = f"insvp-fast[{EXTRAS[error.name]}]"
        print(f"insvp: error: {error.name} is not installed: pip install '{extra}'", file=sys.stderr)
        return 1


def run() -> NoReturn:
    """The process ``insvp``: ``main``, and the end, without what was registered for it before this module's import."""
    # imports make no garbage, but so many objects that all would be searched for it six times
    gc.set_threshold(*gc.get_threshold()[:2], 100)
    warnings.showwarning = partial(_show_warning, warnings.showwarning)
    _statuses.append(main())
    sys.exit(_statuses[0])


def _show_warning(
    show: Callable[..., None], message: Warning | str, category: type[Warning], *place: Any, **to: Any
) -> None:
    """Print our own warnings once, and without the place in the code, which says nothing to who runs a command."""
    if not issubclass(category, InsVPWarning):
        show(message, category, *place, **to)
    elif (line := f"insvp: warning: {_in_one_line(message)}") not in _warned:
        _warned.add(line)
        print(line, file=sys.stderr)


def _in_one_line(message: object) -> str:
    return show_options(" ".join(line.strip() for line in str(message).splitlines()))


@contextmanager
def _everything_to_stderr() -> Iterator[None]:
    """Send what is printed to standard error, also by native code and by processes that are started."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _parser() -> Parser:
    parser = Parser(
        prog="insvp",
        description="Adapt a frozen Vision Transformer with instance visual prompts (InsVP).",
        epilog="`insvp COMMAND --help` explains a command; without options, `insvp train` fits a small model to digits",
    )
    parser.add_argument("--version", action="version", version=f"insvp {__version__}")
    parser.add_argument("--print-completion", action=PrintCompletion)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"insvp_fast.commands.{MODULES.get(name, name)}")
        command = commands.add_parser(name, help=module.SUMMARY, description=module.__doc__)
        command.set_defaults(command=module.run)
        module.add_arguments(command)
    return parser
