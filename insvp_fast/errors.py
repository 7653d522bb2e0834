"""The errors of this package that a user can put right; the command line prints them in one line.

A setting of ``Recipe`` stands in a message in backticks, `lr`: the command line shows it as its option, --lr.
"""

from __future__ import annotations

__all__ = ["CheckpointError", "CommandError", "DataError", "InsVPError", "TrainingError"]


class InsVPError(ValueError):
    """What all others are."""


class CheckpointError(InsVPError):
    """A file that cannot be loaded; the message names the file, the key, what was found and what was expected."""


class DataError(InsVPError):
    """Images, folders, lists or data sets that are not there, or not what they should be."""


class TrainingError(InsVPError):
    """A setting that does not fit, a run folder that cannot be read, or a training that diverged."""


class CommandError(InsVPError):
    """A command that cannot do what it was asked for."""
