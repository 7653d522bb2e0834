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
finished runs and resumes interrupted ones. A linear probe is trained once for all runs that share it. results.md and
results.csv have the means over the seeds, of the validation images to choose by, and of the test images.
"""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from insvp_fast.commands.options import add_json, add_running, make_folder
from insvp_fast.errors import CommandError
from insvp_fast.studies.entries import Entry, find_run, read_runs, scores_of, settings_of_probe, with_one_probe
from insvp_fast.studies.grid import read_grid
from insvp_fast.studies.tables import format_percent, markdown, mean_and_std, write_table
from insvp_fast.training.candidates import PROBE, candidates_of

SUMMARY = "train a grid of settings, and collect the results in a table"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("file", metavar="FILE", help="the grid, in TOML")
    parser.add_argument("--output", metavar="FOLDER", help="folder for the runs (default: sweeps/NAME for NAME.toml)")
    add_running(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the commands without running them")
    add_json(parser)


def run(file: str, output: str | None, jobs: int, launcher: str | None, dry_run: bool) -> dict[str, Any]:
    from insvp_fast.studies.runner import train_entries
    from insvp_fast.training.terminal import print_markdown

    folder = Path(output or Path("sweeps", Path(file).stem))
    entries = with_one_probe(list(read_grid(Path(file), folder)), read_runs(folder))
    if dry_run:
        commands = [f"insvp train {shlex.join(entry.arguments)}" for entry in entries]
        print(*commands, sep="\n")
        return {"commands": commands}
    make_folder(folder)
    failed = 0
    try:
        failed = train_entries(
            entries, folder, jobs, shlex.split(launcher or ""), after=lambda: collect(folder, entries)
        )
    finally:
        text, rows = collect(folder, entries)
        print()
        print_markdown(text)
        print(f"written: {folder / 'results.md'}, results.csv")
    if failed:
        raise CommandError(f"{failed} of {len(entries)} runs failed; the same command tries them again")
    return {"folder": str(folder), "results": rows}


def collect(folder: Path, entries: Sequence[Entry]) -> tuple[str, list[dict[str, Any]]]:
    """Write results.csv and results.md; returns the text of the latter, and the rows of the former.

    A row for each combination of the varied settings but the seed, and model, also where no run has ended. Of the rows
    with the same data, protocol, metric and model the one with the best mean on val is marked.
    """
    varied = [name for name in entries[0].values if name != "seed"]
    runs, planned = read_runs(folder), Counter[tuple[str, ...]]()
    scores: dict[tuple[str, ...], list[tuple[float | None, float]]] = {}
    for entry in entries:
        models = [candidate.name for candidate in candidates_of(entry.recipe)]
        planned.update((*_key(entry, model, varied), model) for model in models)
        for score in scores_of(find_run(runs, entry.recipe)):
            if score.model not in models:  # a probe that another entry counts
                continue
            recipe, metric = entry.recipe, str(score.facts.get("metric", "top1"))
            kind = recipe.data, recipe.protocol, metric, score.model
            scores.setdefault((*_key(entry, score.model, varied), *kind), []).append((score.val, score.test))
    rows = []
    for (*key, data, protocol, metric, model), pairs in scores.items():
        vals = [val for val, _ in pairs if val is not None]
        val, test = mean_and_std(vals) if vals else (None, None), mean_and_std([test for _, test in pairs])
        row = [*key, protocol, metric, model, len(pairs), planned[*key, model], *val, *test]
        rows.append(((data, protocol, metric, model), row))
    ended = {(*key, model) for *key, _, _, _, model in scores}
    for (*key, model), count in planned.items():
        if (*key, model) not in ended:
            rows.append((("", "", "", model), [*key, "–", "–", model, 0, count, *[None] * 4]))
    best: dict[tuple[str, ...], float] = {}
    for group, row in rows:
        best[group] = max(best.get(group, -1.0), -1.0 if row[-4] is None else row[-4])
    text = markdown(
        [*varied, "protocol", "metric", "model", "runs", "validation", "test"],
        [
            [
                *row[:-6],
                f"{row[-6]} of {row[-5]}",
                format_percent(*row[-4:-2]) + (" (best)" if row[-4] == best[group] else ""),
                format_percent(*row[-2:]),
            ]
            for group, row in rows
        ],
    )
    header = [*varied, "protocol", "metric", "model", "runs", "planned", "val_mean", "val_std", "test_mean", "test_std"]
    write_table(folder, "results", header, [row for _, row in rows], text)
    return text, [dict(zip(header, row, strict=True)) for _, row in rows]


def _key(entry: Entry, model: str, varied: Sequence[str]) -> tuple[str, ...]:
    """The values as text; a dash for what a linear probe does not depend on."""
    values = settings_of_probe(entry.values) if model == PROBE else entry.values
    return tuple(str(values[name]) if name in values else "–" for name in varied)
