"""Train every combination of a grid, one after the other, and put the results into one table.

FILE is TOML: [recipe] holds settings of all runs (`recipe = "cub"` among them starts from a shipped recipe), and [grid]
lists of values. "{data}" in `root` stands for the data set's name:

  [recipe]
  recipe = "paper"
  root = "data/{data}"
  [grid]
  data = ["cub", "dtd"]
  lr = [1e-3, 5e-4]
  seed = [0, 1, 2]

Every run is a process of its own with an ordinary run folder. Started again, a sweep goes on where it stopped: finished
runs are left alone and interrupted ones resumed. results.md and results.csv hold mean and standard deviation over the
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from insvp_fast.errors import CommandError
from insvp_fast.recipes import read
from insvp_fast.training.folders import read_config, read_results
from insvp_fast.training.recipe import DIGITS, Recipe
from insvp_fast.training.settings import known, to_arguments

SUMMARY = "train a grid of settings, and put the results into one table"
INTERRUPTED = 130


class Entry(NamedTuple):
    """One run of a sweep."""

    chosen: dict[str, Any]  # from the grid
    arguments: list[str]  # of `insvp train`
    recipe: Recipe  # what they resolve to


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", metavar="FILE", help="the grid, in TOML")
    parser.add_argument("--output", metavar="FOLDER", help="where the runs go (default: sweeps/ and FILE's name)")
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        default=shlex.quote(sys.executable),
        help="what starts a run, for several GPUs: 'torchrun --nproc-per-node 8' (default: this Python)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")


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
    """The runs that a file asks for, the last name of its grid varying fastest.

    Raises:
        CommandError: if it is not such a file, or names something that is no setting.
    """
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {file} ({error})") from error
    fixed, grid = content.pop("recipe", {}), content.pop("grid", {})
    if content or not isinstance(fixed, dict) or not isinstance(grid, dict):
        raise CommandError(f"{file}: expected the tables [recipe] and [grid]{_found(content)}")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise CommandError(f"{file}: [grid] {name} is {values!r}: expected a list of values")
    for combination in itertools.product(*grid.values()):
        chosen = dict(zip(grid, combination, strict=True))
        values = fixed | chosen
        name = values.pop("recipe", None)
        values = known(values, str(file)) | {"output": str(output)}
        settings = (read(name, values.get("released", False)) if name else {}) | values
        if "{data}" in (root := settings.get("root") or ""):
            values["root"] = settings["root"] = root.replace("{data}", settings.get("data", DIGITS))
        yield Entry(chosen, (["--recipe", name] if name else []) + to_arguments(values), Recipe(**settings))


def find_run(folder: Path, recipe: Recipe) -> Path | None:
    """The run with these settings; a finished one if there is one."""
    found = [run for run in sorted(folder.glob("*/")) if _has_settings(run, recipe)]
    return next(filter(read_results, found), found[-1] if found else None)


def _has_settings(run: Path, recipe: Recipe) -> bool:
    try:
        recorded, _ = read_config(run)
    except CommandError:
        return False  # something else, or killed before it wrote its settings
    decided: dict[str, Any] = {"output": recorded.output}  # the sweep's folder may have been moved since
    # and what a run decides itself, and records as decided
    decided |= {"amp": recorded.amp} if recipe.amp == "auto" else {}
    decided |= {"batch_size": recorded.batch_size, "auto_batch": recorded.auto_batch} if recipe.auto_batch else {}
    return dataclasses.replace(recipe, **decided) == recorded


def _train(arguments: Sequence[str], launcher: Sequence[str]) -> int:
    """Run ``insvp train`` in a process of its own: neither memory nor a crash is handed on to the next run."""
    with subprocess.Popen([*launcher, "-m", "insvp_fast", "train", *arguments]) as child:
        try:
            status = child.wait()
        except KeyboardInterrupt:  # it reached the run as well
            status = INTERRUPTED
            child.wait()  # until it has said how it left things
    if status == INTERRUPTED:
        raise KeyboardInterrupt("the same command goes on with the sweep")
    return status


def write_table(folder: Path, entries: Sequence[Entry]) -> str:
    """Write results.csv and results.md, whose text is returned: a line per choice and model, over all seeds."""
    names = [name for name in entries[0].chosen if name != "seed"]
    groups: dict[tuple[object, ...], list[float]] = {}
    planned: dict[tuple[object, ...], int] = {}
    for entry in entries:
        choice = *(str(entry.chosen[name]) for name in names), entry.recipe.protocol
        planned[choice] = planned.get(choice, 0) + 1
        found = find_run(folder, entry.recipe)
        for model, result in (read_results(found) if found else {}).items():
            groups.setdefault((*choice, model), []).append(result["test_accuracy"])
    header = [*names, "protocol", "model", "runs", "planned", "mean", "std"]
    rows: list[list[Any]] = []
    for key, values in groups.items():
        spread = statistics.stdev(values) if len(values) > 1 else None  # of a sample: over n-1
        rows.append([*key, len(values), planned[key[:-1]], statistics.mean(values), spread])

    folder.mkdir(parents=True, exist_ok=True)
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([header, *rows])
    (folder / "results.csv").write_text(table.getvalue(), encoding="utf-8")
    shown = [[*row[:-4], f"{row[-4]} of {row[-3]}", _percent(row[-2], row[-1])] for row in rows]
    lines: list[list[Any]] = [[*header[:-4], "runs", "test accuracy"], ["---"] * (len(header) - 2), *shown]
    text = "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
    (folder / "results.md").write_text(text + "\n", encoding="utf-8")
    return text


def _percent(mean: float, spread: float | None) -> str:
    return f"{100 * mean:.2f}" if spread is None else f"{100 * mean:.2f} ± {100 * spread:.2f}"


def _found(names: dict[str, Any]) -> str:
    return f", found {', '.join(names)}" if names else ""
