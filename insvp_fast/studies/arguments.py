"""Settings as the command-line arguments of ``insvp train``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["to_arguments", "to_option"]


def to_option(name: str) -> str:
    """The option of a setting: ``--batch-size`` for ``batch_size``."""
    return "--" + name.replace("_", "-")


def to_arguments(values: Mapping[str, Any]) -> list[str]:
    """The command-line arguments that give these values."""
    arguments = []
    for name, value in values.items():
        option = to_option(name)
        if isinstance(value, bool):
            arguments.append(option if value else f"--no-{option[2:]}")
        else:
            arguments += [option, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return arguments
