"""The errors of this package that a user can correct, and its warnings; the command line prints each in one line.

In a message, a setting of ``Recipe`` stands in backticks, `lr`; the command line shows it as its option, --lr.
"""

from __future__ import annotations

import inspect
import warnings

__all__ = [
    "INTERRUPTED",
    "CheckpointError",
    "CommandError",
    "DataError",
    "ExportError",
    "InsVPError",
    "InsVPWarning",
    "TrainingError",
    "warn",
]

INTERRUPTED = 130  # the exit status after Ctrl-C, by convention


class InsVPError(ValueError):
    """The base class of all errors below."""


class CheckpointError(InsVPError):
    """A file cannot be loaded; the message names the file, the key, what was found and what was expected."""


class DataError(InsVPError):
    """Images, folders, lists or data sets are missing or not as expected."""


class TrainingError(InsVPError):
    """A setting has an invalid value, a run folder cannot be read, or a training diverged."""


class ExportError(InsVPError):
    """A model cannot be exported as asked, or the file does not compute what the model does."""


class CommandError(InsVPError):
    """A command cannot do what it was asked to do."""


class InsVPWarning(UserWarning):
    """What a user should know of something that is done all the same."""


def warn(message: str) -> None:
    """Warn, at the place of the code that called this package, be it through torch or timm."""
    frame, level = inspect.currentframe(), 1
    between = ("insvp_fast.", "torch.", "timm.", "contextlib")
    while frame is not None and frame.f_globals.get("__name__", "").startswith(between):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, InsVPWarning, stacklevel=level)
