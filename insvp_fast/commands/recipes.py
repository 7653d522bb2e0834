"""List the shipped recipes, or print one with all its settings as TOML, to save, edit and train with."""

from __future__ import annotations

import argparse
import json
from typing import Any

from insvp_fast.commands.options import add_json
from insvp_fast.commands.settings import show_options
from insvp_fast.errors import CommandError
from insvp_fast.recipes import list_shipped, read_recipe, read_title
from insvp_fast.training.recipe import Recipe, setting_names

SUMMARY = "list the shipped recipes, or print one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME|FILE", nargs="?", help="the recipe to print (default: list all)")
    parser.add_argument("--released", action="store_true", help="print the settings of the authors' released code")
    add_json(parser)


def run(name: str | None, released: bool) -> dict[str, Any]:
    if name is None and released:
        raise CommandError("--released is given without the NAME of a recipe")
    if name is None:
        titles = {name: show_options(read_title(name)) for name in list_shipped()}
        print(*(f"{name:10} {title}" for name, title in titles.items()), sep="\n")
        print("\nTrain with `insvp train --recipe NAME --root FOLDER`; --released follows the authors' released code.")
        return titles
    settings = Recipe(**read_recipe(name, released)).to_dict()
    print(f"# {name}{', as released' if released else ''}")
    for setting in setting_names():
        if settings[setting] is not None:  # TOML has no null
            print(f"{setting} = {json.dumps(settings[setting], ensure_ascii=False)}")  # also valid TOML
    return settings
