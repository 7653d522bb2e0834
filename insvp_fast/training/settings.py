"""The fields of ``Recipe`` as options of a command line and as entries of a file; ``Recipe`` is the one place they are.

Names, types and defaults are the dataclass's, the help is its docstring's, and the checks of values are its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple

from insvp_fast.errors import TrainingError
from insvp_fast.training.recipe import Recipe

__all__ = ["SETTINGS", "Setting", "add_settings", "known", "to_arguments"]

LETTERS = {int: "N", float: "X", str: "TEXT"}  # what stands for a value in the help


class Setting(NamedTuple):
    """One field of ``Recipe``."""

    name: str
    kind: type  # of the value, or of each one
    values: int | str | None  # how many: a number, "*" for any, None for one that is no list
    default: Any
    text: str  # what the docstring says

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")


def _settings() -> dict[str, Setting]:
    hints, texts = typing.get_type_hints(Recipe), _texts()
    return {
        field.name: Setting(field.name, *_kind(hints[field.name]), field.default, texts.get(field.name, ""))
        for field in dataclasses.fields(Recipe)
        if field.name != "recipe"  # not a setting: where they came from
    }


def _kind(hint: Any) -> tuple[type, int | str | None]:
    """``float``, ``float | None``, ``tuple[int, int, int] | None`` or ``tuple[str, ...]``, taken apart."""
    if isinstance(hint, types.UnionType):
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if typing.get_origin(hint) is not tuple:
        return hint, None
    kinds = typing.get_args(hint)
    return kinds[0], "*" if kinds[1:] == (...,) else len(kinds)


def _texts() -> dict[str, str]:
    """What the docstring says about each field; an entry may name several, or quote one that it explains as well."""
    arguments = (inspect.getdoc(Recipe) or "").partition("Args:\n")[2].partition("\n\n")[0]
    texts: dict[str, str] = {}
    for names, text in re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {5,}.*)*)", arguments, re.MULTILINE):
        plain = re.sub(r"\s+", " ", text).replace("``", "'").rstrip(".")
        texts |= dict.fromkeys(names.split(", "), plain)
        texts = dict.fromkeys(re.findall(r"``(\w+)``", text), plain) | texts
    return texts


SETTINGS = _settings()


def add_settings(parser: argparse.ArgumentParser) -> None:
    """One option per field. What is not given is not among the parsed options."""
    for setting in SETTINGS.values():
        shown = " ".join(map(str, setting.default)) if isinstance(setting.default, tuple) else setting.default
        note = "" if shown in (None, "") or setting.kind is bool else f" (default: {shown})"
        how: dict[str, Any] = {"help": (setting.text + note).replace("%", "%%"), "default": argparse.SUPPRESS}
        if setting.kind is bool:
            parser.add_argument(setting.option, action=argparse.BooleanOptionalAction, **how)
        else:
            letter = LETTERS[setting.kind]
            parser.add_argument(setting.option, type=setting.kind, nargs=setting.values, metavar=letter, **how)


def known(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a file, if they are all settings; ``where`` precedes a name in messages.

    Raises:
        TrainingError: for a name that is no setting.
    """
    for name in values:
        if name not in SETTINGS:
            raise TrainingError(f"{where}: {name} is no setting; expected some of {', '.join(SETTINGS)}")
    return dict(values)


def to_arguments(values: Mapping[str, Any]) -> list[str]:
    """The options that give these values, the inverse of ``add_settings``."""
    arguments = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            arguments.append(option if value else f"--no-{option[2:]}")
        else:
            arguments += [option, *map(str, value if isinstance(value, (list, tuple)) else [value])]
    return arguments
