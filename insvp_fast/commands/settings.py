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
from insvp_fast.training.setting import GROUPS

__all__ = ["add_settings", "show_options"]

METAVARS = {int: "N", float: "X"}
FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}


def show_options(message: str) -> str:
    """A message with each setting in backticks, `batch_size`, shown as its option, --batch-size."""
    options = {*FIELDS, "channels_last", "class_names", "preprocess", "resume"}
    return re.sub(r"`(\w+)`", lambda match: to_option(match[1]) if match[1] in options else match[0], message)


def add_settings(parser: argparse.ArgumentParser, show_common: bool = True) -> None:
    """Add one option per setting, in groups. Options that are not given are missing from the parsed arguments.

    ``--help`` shows the common settings, a line for each, or none; ``--help-all`` shows everything of all settings.
    """
    parser.formatter_class = ShortHelp
    parser.usage = f"{parser.prog} [OPTION ...]"
    parser.add_argument("--help-all", action=HelpAll, help=f"explain all {len(setting_names())} settings, and exit")
    hints = typing.get_type_hints(Recipe)
    for group in GROUPS:
        section = parser.add_argument_group(group)
        for name in (name for name in setting_names() if FIELDS[name].metadata["group"] == group):
            option, brief = _add_setting(section, name, hints[name]), FIELDS[name].metadata["brief"]
            option.brief = _explain(name, brief) if brief and show_common else ""  # type: ignore[attr-defined]


class LongHelp(argparse.HelpFormatter):
    """A help with all options, and with the paragraphs of the description."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(part if "  " in part else fill(part, width, indent) for part in paragraphs)  # tables stay


class ShortHelp(LongHelp):
    """A help with a line for each common setting, and without the others."""

    def add_argument(self, action: argparse.Action) -> None:
        if getattr(action, "brief", None) != "":
            super().add_argument(action)

    def _expand_help(self, action: argparse.Action) -> str:
        return getattr(action, "brief", None) or super()._expand_help(action)


class HelpAll(argparse.Action):
    """``--help-all``: prints the long help."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.formatter_class = LongHelp
        parser.print_help()
        parser.exit()


class Suggestions(tuple[str, ...]):
    """Choices that the help shows and a shell completes, and that ``Recipe`` checks, as it does for files."""

    def __contains__(self, value: object) -> bool:
        return True


def _add_setting(section: Any, name: str, hint: Any) -> argparse.Action:
    kind, nargs = _split_type(hint)
    metadata = FIELDS[name].metadata
    common: dict[str, Any] = {"help": _explain(name, metadata["help"]).replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is bool:
        return section.add_argument(to_option(name), action=argparse.BooleanOptionalAction, **common)
    choices = Suggestions(metadata["limits"].choices) if metadata["limits"] else None
    metavar = metadata["metavar"] or (None if choices else METAVARS.get(kind))
    return section.add_argument(
        to_option(name), type=kind, nargs=nargs, metavar=metavar, choices=choices or None, **common
    )


def _explain(name: str, text: str) -> str:
    default = FIELDS[name].default
    shown = None if default is False or default == () else "on" if default is True else default
    return show_options(text if shown is None else f"{text} (default: {shown})")


def _split_type(hint: Any) -> tuple[Any, Any]:
    """argparse's ``type`` and ``nargs`` for an annotation such as ``int | None`` or ``tuple[str, ...]``."""
    if isinstance(hint, types.UnionType):
        hint = next(member for member in typing.get_args(hint) if member is not types.NoneType)
    if typing.get_origin(hint) is not tuple:
        return hint, None
    members = typing.get_args(hint)
    return members[0], "*" if members[1:] == (...,) else len(members)
