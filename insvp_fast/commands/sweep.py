"""Train every combination of a grid of settings, one after the other, and collect the results in a table.

FILE is TOML. [recipe] holds settings of all runs (with `recipe = "cub"`, those of a shipped recipe first), and [grid] a
list of values for each setting to vary. "{data}" in `root` stands for the name of the data set:

  [recipe]
  recipe = "paper"
  root = "data/{data}"
  [grid]
  data = ["cub", "dtd"]
  lr = [1e-3, 5e-4]
  seed = [0, 1, 2]

Every run is a process of its own, with its own run folder. Started again, a sweep goes on where it stopped: it skips
finished runs and resumes interrupted ones. results.md and results.csv have the mean and the standard deviation over the
seeds.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import itertools
import shlex
import statistics
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from insvp_fast.commands.cli import INTERRUPTED
from insvp_fast.commands.settings import to_arguments
from insvp_fast.errors import CommandError, TrainingError
from insvp_fast.recipes import read_recipe
from insvp_fast.training.recipe import Recipe, check_names
from insvp_fast.training.run_folder import read_config, read_results

SUMMARY = "train a grid of settings, and collect the results in a table"


class Entry(NamedTuple):
    """One run of a sweep."""

    grid_values: dict[str, Any]
    arguments: list[str]  # of `insvp train`
    recipe: Recipe  # what the arguments resolve to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", metavar="FILE", help="the grid, in TOML")
    parser.add_argument("--output", metavar="FOLDER", help="folder for the runs (default: sweeps/NAME for NAME.toml)")
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        default=shlex.quote(sys.executable),
        help="command that starts a run, such as 'torchrun --nproc-per-node 8' (default: this Python)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands without running them")


def run(file: str, output: str | None, launcher: str, dry_run: bool) -> int:
    folder = Path(output or Path("sweeps", Path(file).stem))
    entries, failed = list(read_grid(Path(file), folder)), 0
    for number, entry in enumerate(entries, 1):
        found = find_run(folder, entry.recipe)
        if found and read_results(found):
            print(f"[{number}/{len(entries)}] finished: {found}", flush=True)
            continue
        arguments = ["--resume", str(found)] if found else entry.arguments
        print(f"[{number}/{len(entries)}] insvp train {shlex.join(arguments)}", flush=True)
        if dry_run:
            continue
        failed += _train(arguments, shlex.split(launcher)) != 0
        write_table(folder, entries)
    if not dry_run:
        print(f"\n{write_table(folder, entries)}\nwritten: {folder / 'results.md'}, results.csv")
    if failed:
        raise CommandError(f"{failed} of {len(entries)} runs failed; the same command tries them again")
    return 0


def read_grid(file: Path, output: Path) -> Iterator[Entry]:
    """The runs of a grid file; the last setting of the grid varies fastest.

    Raises:
        CommandError: if the file is not a grid.
        TrainingError: if it has a name that is no setting, or an invalid value.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {file} ({error})") from error
    fixed, grid = content.pop("recipe", {}), content.pop("grid", {})
    if content or not isinstance(fixed, dict) or not isinstance(grid, dict):
        found = f", found {', '.join(content)}" if content else ""
        raise CommandError(f"{file}: expected the tables [recipe] and [grid]{found}")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise CommandError(f"{file}: [grid] {name} is {values!r}: expected a list of values")
    for combination in itertools.product(*grid.values()):
        grid_values = dict(zip(grid, combination, strict=True))
        values = fixed | grid_values
        name = values.pop("recipe", None)
        values = check_names(values, str(file)) | {"output": str(output)}
        settings = (read_recipe(name, values.get("released", False)) if name else {}) | values
        if "{data}" in (root := settings.get("root") or ""):
            values["root"] = settings["root"] = root.replace("{data}", settings.get("data", Recipe.data))
        yield Entry(grid_values, (["--recipe", name] if name else []) + to_arguments(values), Recipe(**settings))


def find_run(folder: Path, recipe: Recipe) -> Path | None:
    """The run with these settings, preferably a finished one."""
    found = [run for run in sorted(folder.glob("*/")) if _has_settings(run, recipe)]
    return next(filter(read_results, found), found[-1] if found else None)


def _has_settings(run: Path, recipe: Recipe) -> bool:
    try:
        recorded, _ = read_config(run)
    except TrainingError:
        return False  # not a run, or killed before it wrote its settings
    resolved: dict[str, Any] = {"output": recorded.output}  # the sweep's folder may have been moved since
    # and what a run resolves itself and records
    resolved |= {"amp": recorded.amp} if recipe.amp == "auto" else {}
    resolved |= {"batch_size": recorded.batch_size, "auto_batch": recorded.auto_batch} if recipe.auto_batch else {}
    wanted = dataclasses.replace(recipe, **resolved)
    if wanted == recorded:
        return True
    from insvp_fast.training.paths import absolute_paths  # which loads torch

    return absolute_paths(wanted) == absolute_paths(recorded)


def _train(arguments: Sequence[str], launcher: Sequence[str]) -> int:
    """Run ``insvp train`` in a process of its own, so that neither memory nor a crash reaches the next run."""
    with subprocess.Popen([*launcher, "-m", "insvp_fast", "train", *arguments]) as child:
        try:
            status = child.wait()
        except KeyboardInterrupt:  # the child gets it as well
            status = INTERRUPTED
            child.wait()  # until it has printed how to resume
    if status == INTERRUPTED:
        raise KeyboardInterrupt("the same command goes on with the sweep")
    return status


def write_table(folder: Path, entries: Sequence[Entry]) -> str:
    """Write results.csv and results.md with the rows of ``_collect_results``; returns the text of the latter."""
    varied = [name for name in entries[0].grid_values if name != "seed"]
    rows = _collect_results(folder, entries, varied)
    folder.mkdir(parents=True, exist_ok=True)
    content = io.StringIO()
    header = [*varied, "protocol", "model", "runs", "planned", "mean", "std"]
    csv.writer(content, lineterminator="\n").writerows([header, *([*key, *numbers] for key, numbers in rows)])
    (folder / "results.csv").write_text(content.getvalue(), encoding="utf-8")

    header = [*varied, "protocol", "model", "runs", "test accuracy"]
    lines = [header, ["---"] * len(header)]
    for key, (runs, planned, mean, std) in rows:
        spread = "" if std is None else f" ± {100 * std:.2f}"
        lines.append([*key, f"{runs} of {planned}", f"{100 * mean:.2f}{spread}"])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")
    return text


def _collect_results(
    folder: Path, entries: Sequence[Entry], varied: Sequence[str]
) -> list[tuple[tuple[str, ...], tuple[int, int, float, float | None]]]:
    """The test accuracies over the seeds.

    Returns:
        For each combination of the varied settings, protocol and model: the finished and the planned runs, and the mean
        and sample standard deviation, None for a single run.
    """
    accuracies: dict[tuple[str, ...], list[float]] = {}
    planned: Counter[tuple[str, ...]] = Counter()
    for entry in entries:
        combination = *(str(entry.grid_values[name]) for name in varied), entry.recipe.protocol
        planned[combination] += 1
        found = find_run(folder, entry.recipe)
        for model, result in (read_results(found) if found else {}).items():
            accuracies.setdefault((*combination, model), []).append(result["test_accuracy"])
    rows = []
    for key, values in accuracies.items():
        std = statistics.stdev(values) if len(values) > 1 else None
        rows.append((key, (len(values), planned[key[:-1]], statistics.mean(values), std)))
    return rows
