"""Scripts with which a shell completes commands, options, choices and file names."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["PrintCompletion"]

SHELLS = ("bash", "zsh", "tcsh")


class PrintCompletion(argparse.Action):
    """``--print-completion``: prints the script of a shell, made by shtab."""

    def __init__(self, option_strings: list[str], dest: str) -> None:
        text = "print a script that completes commands and options"
        super().__init__(option_strings, argparse.SUPPRESS, choices=SHELLS, default=argparse.SUPPRESS, help=text)

    def __call__(self, parser: argparse.ArgumentParser, _: Any, shell: Any, __: Any = None) -> None:
        import shtab

        for action in _all_actions(parser):
            names = str(action.metavar).replace("|", " ").split()
            if {"FILE", "PATH", "FOLDER", "RUN", "ADAPTER", "IMAGE"} & set(names):
                folder = set(names) <= {"FOLDER", "RUN", "ADAPTER"}
                action.complete = shtab.DIRECTORY if folder else shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell))
        parser.exit()


def _all_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Those of the parser and of its commands."""
    actions = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            actions += [inner for command in action.choices.values() for inner in _all_actions(command)]
    return actions
