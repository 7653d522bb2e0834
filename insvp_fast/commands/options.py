"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

from insvp_fast.errors import CommandError

__all__ = ["add_json", "add_loading", "make_folder", "positive"]


def positive(text: str) -> int:
    """The argparse type of a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return int(text)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, for which the command line prints what the command returns."""
    text = "print the result as a JSON object, all else to standard error"
    parser.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help=text)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options for loading images."""
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images per batch (default: as in training)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load images (default: as in training)")


def make_folder(path: str | Path) -> Path:
    """The folder that --output or its default names, which is made if it does not exist.

    Raises:
        CommandError: if it cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output is {path}: no folder can be made there ({error.strerror})") from error
    return folder
