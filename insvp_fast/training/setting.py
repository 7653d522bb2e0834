"""What a setting of a recipe is: a field with a group, a help text and limits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = [
    "BELOW_ONE",
    "GROUPS",
    "NAMED_VALUES",
    "NOT_NEGATIVE",
    "POSITIVE",
    "PROBABILITY",
    "SEED",
    "Limits",
    "at_least",
    "one_of",
    "setting",
    "some_of",
]

GROUPS = ("data", "model", "prompts", "training", "speed", "output")  # in the order of the help


class Limits(NamedTuple):
    """The values that a setting may have: ``expected`` says in a message which ``accepts`` accepts."""

    accepts: Callable[[Any], bool]
    expected: str
    choices: tuple[str, ...] = ()


def one_of(*choices: str) -> Limits:
    return Limits(lambda value: value in choices, f"one of {', '.join(choices)}", choices)


def some_of(*choices: str) -> Limits:
    return Limits(lambda values: all(value in choices for value in values), f"some of {', '.join(choices)}", choices)


def at_least(least: int) -> Limits:
    return Limits(lambda value: value >= least, f"at least {least}")


POSITIVE = Limits(lambda value: 0 < value < math.inf, "a positive number")
NOT_NEGATIVE = Limits(lambda value: 0 <= value < math.inf, "a number of at least 0")
BELOW_ONE = Limits(lambda value: 0 <= value < 1, "a number in [0, 1)")
PROBABILITY = Limits(lambda value: 0 <= value <= 1, "a number in [0, 1]")
SEED = Limits(lambda value: 0 <= value < 2**32, "an integer from 0 to 2^32-1")
NAMED_VALUES = Limits(
    lambda values: all(name.isidentifier() and value for name, _, value in (str(v).partition("=") for v in values)),
    "NAME=VALUE, such as rank=8",
)


def setting(
    group: str,
    default: Any,
    help: str,
    limits: Limits | None = None,
    *,
    metavar: str | None = None,
    brief: str | None = None,
) -> Any:
    """A field of a dataclass, with metadata for the command line and for checks.

    Args:
        group: one of ``GROUPS``, under which the help shows it.
        metavar: stands for the value in the help.
        brief: what the short help says, in a line; None for a setting that it leaves out.
    """
    facts = {"group": group, "help": help, "limits": limits, "metavar": metavar, "brief": brief}
    return dataclasses.field(default=default, metadata=facts)
