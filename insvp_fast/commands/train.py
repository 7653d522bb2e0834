"""Adapt a frozen backbone to a data set, and a linear probe beside it for comparison.

The settings are those of --recipe, a shipped recipe or a file, where one is given; each can be overridden by its own
option. The run leaves a new folder with the adapter, the settings as they were resolved, metrics and pictures. On
several GPUs: `torchrun --nproc-per-node 8 -m insvp_fast train ...` or `accelerate launch -m insvp_fast.cli train`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from insvp_fast.errors import CommandError
from insvp_fast.recipes import read
from insvp_fast.training.folders import read_config
from insvp_fast.training.recipe import Recipe
from insvp_fast.training.settings import add_settings

SUMMARY = "adapt a backbone to a data set"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME|FILE", help="settings to start from: see `insvp recipes`")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was interrupted, with its own settings")
    add_settings(parser)


def run(recipe: str | None, resume: str | None, **given: Any) -> int:
    try:
        settings = _resolve(recipe, resume, given)
    except CommandError as error:
        print(f"insvp train: error: {error}", file=sys.stderr)
        return 2
    from insvp_fast.training.run import train

    train(settings, resume=resume)
    return 0


def _resolve(recipe: str | None, resume: str | None, given: dict[str, Any]) -> Recipe:
    if resume is None:
        return Recipe(**(read(recipe, released=given.get("released", False)) if recipe else {}) | given)
    if recipe or given:
        other = ["--recipe"] * bool(recipe) + [f"--{name.replace('_', '-')}" for name in given]
        raise CommandError(f"--resume goes on with the settings of {resume}: expected no {', '.join(other)}")
    return read_config(resume)[0]
