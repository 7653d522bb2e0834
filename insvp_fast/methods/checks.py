"""Checks of the settings of methods, which come from a command line, or from a file that somebody sent."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

from insvp_fast.config import is_number

__all__ = ["require_at_least", "require_each_at_least", "require_finite", "require_probabilities"]


def require_at_least(least: int, **settings: int | None) -> None:
    """Check that settings are integers of at least ``least``; None is a default.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in settings.items():
        if value is not None and not _is_at_least(least, value):
            raise ValueError(f"{name}={value!r}: expected an integer of at least {least}")


def require_each_at_least(least: int, **settings: Sequence[int] | None) -> None:
    """Check that settings are sequences of integers of at least ``least``; None is a default.

    Raises:
        ValueError: naming the setting.
    """
    for name, values in settings.items():
        is_sequence = isinstance(values, Sequence) and all(_is_at_least(least, value) for value in values)
        if not (values is None or is_sequence):
            raise ValueError(f"{name}={values!r}: expected integers of at least {least}")


def require_finite(**settings: float) -> None:
    """Check that settings are finite numbers.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in settings.items():
        if not is_number(value):
            raise ValueError(f"{name}={value!r}: expected a finite number")


def require_probabilities(**settings: float) -> None:
    """Check that settings are numbers from 0 to 1.

    Raises:
        ValueError: naming the setting.
    """
    for name, value in settings.items():
        if not (is_number(value) and 0 <= value <= 1):
            raise ValueError(f"{name}={value!r}: expected 0 to 1")


def _is_at_least(least: int, value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
