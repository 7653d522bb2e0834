"""Train the comparisons of the paper, each with one protocol for all models, and write its table or figure.

  table1   methods on ten data sets            table4   methods on a ViT trained by MoCo v3
  table2   methods on VTAB-1k                  table5   the four prompts of InsVP, cumulative and alone
  table3   methods on a Swin Transformer       figure5  accuracy against trained parameters, from the runs of table1
  figure7  prompt length, number of prompted blocks, and the weights beta_I and beta_F

Without --data and --recipe: the digits, with the small backbone of the package. With `--recipe paper --root FOLDER`,
the paper's data sets and protocol; "{data}" in the root stands for the name of the data set, and sets whose files are
missing are left out. The learning rate of each model is picked on the validation images, unless --lr gives it. The
options of `insvp train` apply too, which --help-all shows. Started again, the command goes on; finished runs are not
repeated.

Figures 1, 3 and 4 are `insvp prompts RUN IMAGE...`, figures 6 and 8 `insvp tsne RUN...`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from insvp_fast.commands.options import add_json, add_running, make_folder, positive
from insvp_fast.commands.settings import add_settings
from insvp_fast.data.sets import DIGITS, SETS
from insvp_fast.errors import CommandError, TrainingError
from insvp_fast.recipes import list_shipped, read_recipe
from insvp_fast.studies.entries import Protocol, Row
from insvp_fast.studies.grid import make_entry
from insvp_fast.studies.paper import PROMPTS, STUDIES, UNVARIED, PaperStudy, method_rows, sensitivity
from insvp_fast.training.recipe import METHODS, Recipe
from insvp_fast.training.setting import POSITIVE

SUMMARY = "train the comparisons of the paper"
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
NAMES = (*STUDIES, "figure5", "figure7")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", metavar="TABLE|FIGURE", choices=NAMES, help=", ".join(NAMES))
    parser.add_argument("--recipe", metavar="NAME|FILE", help="settings to start from; paper: those of each data set")
    only = "only these (tables 1 to 4, figure5)"
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="NAME", help=only)
    rates = f"learning rates to try (default: {' '.join(map(str, RATES))}); figure7 has the one of the recipe"
    parser.add_argument("--rates", nargs="+", type=float, metavar="X", help=rates)
    parser.add_argument("--seeds", type=positive, default=5, metavar="N", help="number of seeds (default: 5)")
    add_running(parser)
    add_json(parser)
    add_settings(parser, show_common=False)
    parser.usage = f"{parser.prog} TABLE|FIGURE [OPTION ...]"


def run(
    what: str,
    recipe: str | None,
    methods: Sequence[str] | None,
    rates: Sequence[float] | None,
    seeds: int,
    jobs: int,
    launcher: str | None,
    **given: Any,
) -> dict[str, Any]:
    from insvp_fast.studies.comparison import compare
    from insvp_fast.studies.report import report
    from insvp_fast.training.terminal import print_markdown

    _refuse(what, recipe, methods, rates, given)
    table = "table1" if what == "figure5" else what
    study = STUDIES["table5" if what == "figure7" else table]
    if methods:
        study = study._replace(rows=method_rows(tuple(methods)))
    folder = Path(given.pop("output", Path("paper", table)))
    sets = _data_sets(study, recipe, given)
    make_folder(folder)
    launch, rates = shlex.split(launcher or ""), [given["lr"]] if "lr" in given else rates or RATES

    def protocol(data: str) -> Protocol:
        base = {"recipe": data if recipe == "paper" and data in list_shipped() else recipe} if recipe else {}
        own = read_recipe(base["recipe"]) if base else {}
        defaults = {} if "pictures" in own else {"pictures": False}
        return Protocol(defaults | base | study.settings | given | {"data": data}, rates, range(seeds))

    if what == "figure7":
        return _sensitivity(protocol(sets[0]), folder, jobs, launch)
    study = study._replace(rows=_possible(study.rows, protocol(sets[0]), folder))
    if {*sets} - SETS.keys():
        study = study._replace(numbers={})  # a folder may have the name of a set
    results = {}
    for data in sets:
        results[_name(data)] = compare(study.rows, protocol(data), folder / _name(data), jobs, launch)
    print()
    print_markdown(report(table, study, results, protocol(sets[0]), folder))
    if what == "figure5":
        _draw_parameters(results, folder)
    print(f"written: {folder}")
    _require_all([row for rows in results.values() for row in rows], seeds)
    return {"folder": str(folder), "results": {name: _records(rows) for name, rows in results.items()}}


def _draw_parameters(results: dict[str, list[Any]], folder: Path) -> None:
    """Figure 5, a picture for each data set."""
    from insvp_fast.figures.comparison import plot_parameters
    from insvp_fast.studies.report import measured_by

    for name, rows in results.items():
        points = [
            (row.row.label, next(iter(row.scores.values())).facts["trained_parameters"], *row.test())
            for row in rows
            if row.scores
        ]
        if points:  # some runs did not fail
            file = folder / f"figure5-{name.replace('/', '-')}.png"
            plot_parameters(points, file, title=name, measured=measured_by(rows))


def _name(data: str) -> str:
    """Of a set its name, of a folder the last part: its path would lead out of the study's folder."""
    return data if data in SETS else Path(data).resolve().name


def _refuse(
    what: str,
    recipe: str | None,
    methods: Sequence[str] | None,
    rates: Sequence[float] | None,
    given: dict[str, Any],
) -> None:
    """Refuse settings that a study chooses itself, and what would train the same twice.

    Raises:
        CommandError: naming the option.
    """
    chosen = {"seed": "--seeds", "split_seed": "--seeds", "probe": "a row of its own", "method": "--methods"}
    chosen["retrain"] = "val, by which the rates are picked"
    if what == "table5":
        chosen |= dict.fromkeys(PROMPTS.values(), "rows with and without it")
    for name, instead in chosen.items():
        if name in given:
            raise CommandError(f"`{name}` is given: expected none, as a study has {instead}")
    own = read_recipe(recipe, given.get("released", False)) if recipe else {}
    for name in [name for name in chosen if name not in ("seed", "split_seed", "probe")]:  # these give way
        if own.get(name, default := getattr(Recipe, name)) != default:
            found = f"recipe {recipe}: {name} is {own[name]}"
            raise CommandError(f"{found}: expected {default}, as a study has {chosen[name]}")
    if methods and what in ("table5", "figure7"):
        raise CommandError(f"--methods is {' '.join(methods)}: expected none, {what} compares InsVP with itself")
    shown = " ".join(map(str, rates or ()))
    if rates and ("lr" in given or what == "figure7"):
        instead = "--lr is given" if "lr" in given else "figure7 has the learning rate of the recipe"
        raise CommandError(f"--rates is {shown}: expected none, {instead}")
    if not all(map(POSITIVE.accepts, rates or ())):
        raise CommandError(f"--rates is {shown}: expected {POSITIVE.expected} each")
    for option, values in (("methods", methods or ()), ("rates", rates or ())):
        if len(set(values)) < len(values):
            raise CommandError(f"--{option} is {' '.join(map(str, values))}: expected each value once")


def _require_all(rows: Sequence[Any], seeds: int) -> None:
    """Say at the end, after the table, what is not in it.

    Raises:
        CommandError: with the number of runs.
    """
    if missing := sum(seeds - len(row.scores) for row in rows):
        raise CommandError(f"{missing} runs failed and are not in the table; the same command tries them again")


def _data_sets(study: PaperStudy, recipe: str | None, given: dict[str, Any]) -> Sequence[str]:
    """The data sets to run: the given one, those of the study that are there, or the digits.

    Raises:
        CommandError: if none of the study's sets is there, or not the given one.
    """
    own = (read_recipe(recipe) if recipe else {"data": DIGITS}) | given
    root = str(own.get("root") or ".")
    asked = [str(own["data"])] if "data" in own else study.sets
    there = [
        name
        for name in asked
        if name not in SETS or all(Path(root.replace("{data}", name), file).exists() for file in SETS[name].files)
    ]
    for name in (name for name in asked if name not in there):
        reason = f"{name}, whose files are not in {root.replace('{data}', name)} (see `insvp data list`)"
        if "data" in own:
            raise CommandError(f"`data` is {reason}")
        print(f"left out: {reason}")
    if not there:
        raise CommandError(f"`root` is {root}: expected the files of some of {', '.join(study.sets)}")
    return there


def _possible(rows: Sequence[Row], protocol: Protocol, folder: Path) -> list[Row]:
    """The rows whose methods the backbone can have; what is left out is said, with the reason.

    Raises:
        InsVPError: if there is no such backbone, or a row of InsVP does not go with it.
    """
    from insvp_fast.studies.comparison import settings_of
    from insvp_fast.training.backbone import load_backbone
    from insvp_fast.training.models import build_model

    recipe = make_entry({}, protocol.settings, folder, "paper").recipe
    backbone, possible = load_backbone(recipe.backbone, recipe.checkpoint, recipe.img_size), []
    for row in rows:
        recipe = make_entry({}, settings_of(row, protocol), folder, row.label).recipe
        try:
            build_model(recipe.method, recipe, backbone, 1)
        except TrainingError as error:
            if recipe.method == "insvp":
                raise
            print(f"left out: {row.label}: {error}", file=sys.stderr)
        else:
            possible.append(row)
    if not possible:
        raise CommandError(f"`backbone` is {recipe.backbone}: none of the rows can be trained around it")
    return possible


def _sensitivity(protocol: Protocol, folder: Path, jobs: int, launcher: Sequence[str]) -> dict[str, Any]:
    """Figure 7, at the learning rate of the recipe: what is varied is the setting alone."""
    from insvp_fast.figures.comparison import plot_sensitivity
    from insvp_fast.reference import structure_of
    from insvp_fast.studies.comparison import compare
    from insvp_fast.studies.report import measured_by, report
    from insvp_fast.training.backbone import load_backbone
    from insvp_fast.training.models import build_model
    from insvp_fast.training.terminal import print_markdown

    recipe = make_entry({}, protocol.settings, folder, "figure7").recipe
    backbone = load_backbone(recipe.backbone, recipe.checkpoint, recipe.img_size)
    build_model(recipe.method, recipe, backbone, 1)  # refuses prompts that the backbone cannot have
    varied = sensitivity(recipe, depth=len(structure_of(backbone).widths(backbone)))
    if not varied:
        raise CommandError("all prompts are off: expected some, as figure7 varies their settings")
    others = [row for panel in varied.values() for row in panel.values() if row is not UNVARIED]
    rows, protocol = [UNVARIED, *others], protocol._replace(rates=[recipe.lr])
    results = compare(rows, protocol, folder, jobs, launcher)
    found: dict[str, Any] = {compared.row.label: compared for compared in results if compared.scores}  # others failed
    panels = {
        title: [(value, *found[row.label].test()) for value, row in panel.items() if row.label in found]
        for title, panel in varied.items()
    }
    study = PaperStudy("hyper-parameters of InsVP", rows, (), UNVARIED.label, {})
    print()
    name = _name(protocol.settings["data"])
    print_markdown(report("figure7", study, {name: results}, protocol, folder))
    if found:
        drawn = {title: points for title, points in panels.items() if points}
        plot_sensitivity(drawn, folder / "figure7.png", measured_by(results))
    print(f"written: {folder}")
    _require_all(results, len(protocol.seeds))
    return {"folder": str(folder), "results": {name: _records(results)}}


def _records(rows: Sequence[Any]) -> list[dict[str, Any]]:
    """For each row its rate, and the final record and seed of each run."""
    records = []
    for row, rate, _, scores in rows:
        runs = [{"seed": seed, "val": score.val} | score.facts for seed, score in scores.items()]
        records.append({"row": row.label, "rate": rate, "runs": runs})
    return records
