"""Options that several commands have."""

from __future__ import annotations

import argparse

__all__ = ["add_loading", "positive"]


def positive(text: str) -> int:
    """The type of an option that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return int(text)


def add_loading(parser: argparse.ArgumentParser) -> None:
    """How images are put through a model."""
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images at a time (default: as in training)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that load images (default: as in training)")
