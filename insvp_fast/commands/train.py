"""Train InsVP on a data set around a frozen backbone, and a linear probe for comparison.

A run makes a new folder with adapter, settings, metrics and plots. Options override those of --recipe.
On several GPUs: `torchrun --standalone --nproc-per-node 8 -m insvp_fast train ...`.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from insvp_fast.commands.options import add_json
from insvp_fast.commands.settings import add_settings, show_options
from insvp_fast.data.sets import DIGITS
from insvp_fast.errors import CommandError, InsVPError
from insvp_fast.recipes import read_recipe
from insvp_fast.studies.arguments import to_option
from insvp_fast.training.recipe import BUILTIN_BACKBONE, Recipe
from insvp_fast.training.run_folder import read_config, read_results

SUMMARY = "train InsVP on a data set"
SMALL = (
    f"the backbone is {BUILTIN_BACKBONE}, a small one for images of 32x32 pixels, since none is given;"
    " for photographs add --recipe paper, or --backbone vit_base_patch16_224.orig_in21k"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", metavar="NAME|FILE", help="settings to start from (see `insvp recipes`)")
    parser.add_argument("--resume", metavar="RUN", help="go on with an interrupted run, with its own settings")
    find = parser.add_argument(
        "--find-lr",
        action="store_true",
        default=argparse.SUPPRESS,
        help="do not train, but suggest a value for --lr: 100 steps with rising rates, drawn in OUTPUT/DATA-lr/lr.png",
    )
    find.brief = "do not train, but suggest a value for --lr"  # type: ignore[attr-defined]
    add_json(parser)
    add_settings(parser)


def run(recipe: str | None, resume: str | None, find_lr: bool = False, **given: Any) -> dict[str, Any] | None:
    try:
        settings = _resolve(recipe, resume, given)
        if resume and find_lr:
            raise CommandError("--resume goes on with a run: expected no --find-lr")
    except InsVPError as error:
        print(f"insvp train: error: {show_options(str(error))}", file=sys.stderr)
        sys.exit(2)
    from accelerate import PartialState

    from insvp_fast.training import run

    if find_lr:
        result: dict[str, Any] = {"lr": run.find_lr(settings)}
        if not PartialState().is_main_process:
            return None
        print(f"suggested: --lr {result['lr']:.2g}")
        return result
    folder = run.train(settings, resume=resume)
    return {"run": folder, "results": read_results(folder)} if PartialState().is_main_process else None


def _resolve(recipe: str | None, resume: str | None, given: dict[str, Any]) -> Recipe:
    if resume is None:
        settings = (read_recipe(recipe, released=given.get("released", False)) if recipe else {}) | given
        resolved = Recipe(**settings)
        if resolved.data != DIGITS and "backbone" not in settings and os.environ.get("RANK", "0") == "0":
            print(SMALL)
        return resolved
    if recipe or given:
        other = ["--recipe"] * bool(recipe) + [to_option(name) for name in given]
        raise CommandError(f"--resume goes on with the settings of {resume}: expected no {', '.join(other)}")
    return read_config(resume)[0]
