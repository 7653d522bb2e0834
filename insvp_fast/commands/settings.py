"""The settings of a ``Recipe`` as command-line options; names, types, defaults and help are those of its fields."""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from typing import Any

from insvp_fast.studies.arguments import to_option
from insvp_fast.training.recipe import Recipe, setting_names

__all__ = ["add_settings", "show_options"]

METAVARS = {int: "N", float: "X"}
GROUPS = {  # the headings of the help, each above the options from this setting on
    "backbone": "backbone and data",
    "epochs": "optimization",
    "amp": "computation",
    "prompt_length": "model",
    "probe": "run",
}
FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}


def show_options(message: str) -> str:
    """A message with each setting in backticks, `batch_size`, shown as its option, --batch-size."""
    options = {*FIELDS, "class_names", "resume"}
    return re.sub(r"`(\w+)`", lambda match: to_option(match[1]) if match[1] in options else match[0], message)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add one option per setting. Options that are not given are missing from the parsed arguments."""
    hints = typing.get_type_hints(Recipe)
    for name in setting_names():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        kind, nargs = _split_type(hints[name])
        metadata, default = FIELDS[name].metadata, FIELDS[name].default
        shown = None if default is False or default == () else "on" if default is True else default
        note = "" if shown is None else f" (default: {shown})"
        text = show_options(metadata["help"] + note).replace("%", "%%")
        common: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if kind is bool:
            group.add_argument(to_option(name), action=argparse.BooleanOptionalAction, **common)
        else:
            choices = metadata["limits"].choices if metadata["limits"] else ()  # which Recipe checks, for files too
            metavar = f"{{{','.join(choices)}}}" if choices else metadata["metavar"] or METAVARS[kind]
            group.add_argument(to_option(name), type=kind, nargs=nargs, metavar=metavar, **common)


def _split_type(hint: Any) -> tuple[Any, Any]:
    """argparse's ``type`` and ``nargs`` for an annotation such as ``int | None`` or ``tuple[str, ...]``."""
    if isinstance(hint, types.UnionType):
        hint = next(member for member in typing.get_args(hint) if member is not types.NoneType)
    if typing.get_origin(hint) is not tuple:
        return hint, None
    members = typing.get_args(hint)
    return members[0], "*" if members[1:] == (...,) else len(members)
