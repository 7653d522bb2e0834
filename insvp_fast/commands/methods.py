"""List the methods of `insvp train --method`: what each trains, and where it is from."""

from __future__ import annotations

import argparse

from insvp_fast.commands.options import add_json
from insvp_fast.method_names import METHODS

SUMMARY = "list the methods that can be trained"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run() -> dict[str, str]:
    methods = {"insvp": "prompts of each image, in the image and in each block (Liu et al., ACM MM 2024)"} | METHODS
    print(*(f"{name:12} {text}" for name, text in methods.items()), sep="\n")
    return methods
