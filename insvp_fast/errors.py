"""The errors of this package that a user can correct; the command line prints each in one line.

In a message, a setting of ``Recipe`` stands in backticks, `lr`; the command line shows it as its option, --lr.
"""

from __future__ import annotations

__all__ = ["INTERRUPTED", "CheckpointError", "CommandError", "DataError", "ExportError", "InsVPError", "TrainingError"]

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
