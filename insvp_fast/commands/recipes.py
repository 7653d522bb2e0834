"""List the shipped recipes, or print one with all its settings, ready to be kept as a file, edited and trained from."""

from __future__ import annotations

import argparse
import json
from typing import Any

from insvp_fast.recipes import read, shipped, title
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.settings import SETTINGS

SUMMARY = "list the shipped recipes, or print one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME|FILE", nargs="?", help="a recipe to print as TOML")
    parser.add_argument("--released", action="store_true", help="as in the authors' released code, not as in the paper")


def run(name: str | None, released: bool) -> int:
    if name is None:
        print(*(f"{name:10} {title(name)}" for name in shipped()), sep="\n")
        print("\ninsvp train --recipe NAME --root FOLDER trains by one; add --released for the authors' released code.")
        return 0
    recipe = Recipe(**read(name, released)).to_dict()
    print(f"# {name}{', as released' if released else ''}")
    for field in SETTINGS:  # what is None is left to be decided by the run, and TOML has no word for it
        if recipe[field] is not None:
            print(f"{field} = {_toml(recipe[field])}")
    return 0


def _toml(value: Any) -> str:
    """Strings, numbers, booleans and lists of them are written in TOML as in JSON."""
    return json.dumps(value, ensure_ascii=False)
