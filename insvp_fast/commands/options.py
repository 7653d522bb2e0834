"""Options that several commands have."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from insvp_fast.commands.settings import FIELDS
from insvp_fast.errors import CommandError
from insvp_fast.training.setting import Limits, at_least

__all__ = [
    "RUN_OR_ADAPTER",
    "add_address",
    "add_amp",
    "add_backbone",
    "add_json",
    "add_loading",
    "add_model",
    "add_running",
    "add_tta",
    "check_address",
    "integer",
    "make_folder",
    "output_file",
    "positive",
    "read_class_names",
]

RUN_OR_ADAPTER: dict[str, Any] = {
    "metavar": "RUN|ADAPTER",
    "help": "a run folder of `insvp train`, an adapter folder, or the name of an adapter on the Hub",
}


def integer(limits: Limits) -> Callable[[str], int]:
    """The argparse type of an integer that these limits accept; none accept one below 0."""

    def parse(text: str) -> int:
        if not (text.isdecimal() and limits.accepts(int(text))):
            raise argparse.ArgumentTypeError(f"{text}: expected {limits.expected}")
        return int(text)

    return parse


positive = integer(at_least(1))


def add_address(parser: argparse.ArgumentParser, port: int) -> None:
    """Add the address that a server listens at."""
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at (default: %(default)s)")
    kind = integer(Limits(lambda number: number < 2**16, "a port, 0 to 65535"))
    parser.add_argument(
        "--port", type=kind, default=port, help="the port, 0 for any that is free (default: %(default)s)"
    )


def check_address(host: str, port: int) -> None:
    """Check that a server can listen at an address, before the work for it.

    Raises:
        CommandError: if it cannot.
    """
    try:  # as asyncio does, for which "" is every address of this machine
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        socket.create_server(address, family=family).close()
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else str(getattr(error, "strerror", error))
        problem = f"--host is {host!r} and --port {port}: no server can listen there ({reason})"
        raise CommandError(problem) from error


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, for which the command line prints what the command returns."""
    text = "print the result as a JSON object, all else to standard error"
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=text)


def add_model(parser: argparse.ArgumentParser, name: str = "run", **argument: Any) -> None:
    """Add the trained model, and the options for what an adapter may not say of itself."""
    parser.add_argument(name, **RUN_OR_ADAPTER | argument)
    add_backbone(parser)
    parser.add_argument(
        "--class-names", metavar="FILE", help="the classes of an adapter that does not name them, one in each line"
    )


def add_tta(parser: argparse.ArgumentParser) -> None:
    """Add augmentation at test time."""
    parser.add_argument(
        "--tta",
        choices=["none", "flip"],
        default="none",
        help="flip: the mean of the logits for the image and for its mirror image (default: none)",
    )


def add_amp(parser: argparse.ArgumentParser) -> None:
    """Add the precision, with the choices of training, and fp32 as its default."""
    facts = FIELDS["amp"].metadata
    parser.add_argument("--amp", choices=facts["limits"].choices, default="off", help=f"{facts['help']} (default: off)")


def add_backbone(parser: argparse.ArgumentParser) -> None:
    """Add the backbone, which an adapter may not name."""
    parser.add_argument(
        "--backbone",
        metavar="NAME|PATH",
        help="the backbone, as in `insvp train` (default: the one that the run or the adapter names)",
    )


def read_class_names(file: str | None) -> list[str] | None:
    """The lines of the file of ``--class-names``; None without one.

    Raises:
        CommandError: if it cannot be read.
    """
    try:
        return None if file is None else Path(file).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise CommandError(f"--class-names is {file}: not a text that can be read ({error})") from error


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options for loading images."""
    parser.add_argument(
        "--batch-size", type=positive, metavar="N", help="images per batch (default: as in training; 32 for an adapter)"
    )
    parser.add_argument(
        "--workers",
        type=integer(at_least(0)),
        metavar="N",
        help="processes that load images (default: as in training; 0 for an adapter)",
    )


def add_running(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how runs are started."""
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        help="command that starts a run, such as 'torchrun --standalone --nproc-per-node 8' (default: this Python)",
    )


def output_file(path: str | Path, option: str = "--output") -> Path:
    """The file that an option or its default names, whose folder is made if it does not exist.

    Raises:
        CommandError: if something else than a file has that name, or the folder to put it in is read-only or cannot be
            made.
    """
    file = Path(path)
    if file.exists() and not file.is_file():  # it would be replaced, a device too
        found = "a folder" if file.is_dir() else "a device or pipe"
        raise CommandError(f"{option} is {path}: found {found}, expected the name of a file")
    _make_folder(file.parent, f"{option} is {path}")
    return file


def make_folder(path: str | Path, option: str = "--output") -> Path:
    """The folder that an option or its default names, which is made if it does not exist.

    Raises:
        CommandError: if it cannot be made, or is read-only.
    """
    _make_folder(Path(path), f"{option} is {path}")
    return Path(path)


def _make_folder(folder: Path, what: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"{what}: no folder can be made there ({error.strerror})") from error
    if not os.access(folder, os.W_OK):
        raise CommandError(f"{what}: the folder {folder} is read-only: expected another one")
