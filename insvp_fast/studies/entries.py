"""One run of a study, and what became of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from insvp_fast.errors import TrainingError
from insvp_fast.training.candidates import LINEAR, candidates_of
from insvp_fast.training.paths import absolute_paths
from insvp_fast.training.recipe import Recipe, score_name
from insvp_fast.training.run_folder import read_asked, read_metrics, read_results

__all__ = [
    "Entry",
    "Found",
    "Protocol",
    "Row",
    "Score",
    "find_run",
    "read_runs",
    "scores_of",
    "settings_of_probe",
    "with_one_probe",
]

# what a linear probe depends on: besides these, its runs would be repetitions to the bit
PROBE_SETTINGS: tuple[str, ...] = ("backbone", "checkpoint", "img_size", "data", "root", "preprocessing")
PROBE_SETTINGS += ("exif_rotation", "protocol", "split_seed", "select_on", "metric", "retrain", "amp")
# settings by which no runs are told apart: the study's folder may have been moved, and the others change no number
IGNORED = ("output", "pictures", "save_every")
# numbers and switches among the others: no path, which has several spellings
NUMBERS = [field.name for field in dataclasses.fields(Recipe) if field.type in ("bool", "int", "float")]
NUMBERS = [name for name in NUMBERS if name not in (*IGNORED, "probe")]


class Entry(NamedTuple):
    """One run of a study.

    Attributes:
        values: what tells it from the others.
        recipe: its settings.
        arguments: of ``insvp train``, for the same settings.
    """

    values: dict[str, Any]
    recipe: Recipe
    arguments: list[str]


class Row(NamedTuple):
    """A model to compare: its name in the table, and its settings over those that all share."""

    label: str
    settings: dict[str, Any]


class Protocol(NamedTuple):
    """How all rows are trained.

    Attributes:
        settings: that all rows share.
        rates: the learning rates to choose from, by the accuracy on val with the first seed.
        seeds: of the splits, weights and batches of a run: the runs of one seed see the same images in the same order.
    """

    settings: dict[str, Any]
    rates: Sequence[float]
    seeds: Sequence[int]


class Found(NamedTuple):
    """A run folder with the settings that were asked for."""

    folder: Path
    recipe: Recipe

    @property
    def finished(self) -> bool:
        """Whether all its models are trained and tested."""
        return bool(read_results(self.folder))


class Score(NamedTuple):
    """How well a model of a finished run did; accuracies in [0, 1].

    Attributes:
        val: of the kept epoch; None where val was trained on.
        facts: the final record of the model.
    """

    model: str
    val: float | None
    test: float
    facts: dict[str, Any]


def read_runs(folder: Path) -> list[Found]:
    """The runs in a folder."""
    found = []
    for run in sorted(folder.glob("*/")):
        try:
            found.append(Found(run, read_asked(run)))
        except TrainingError:
            continue  # not a run, or killed before it wrote its settings
    return found


def find_run(runs: Iterable[Found], recipe: Recipe) -> Found | None:
    """The run with these settings, preferably a finished one; it may fit a probe that is not asked for."""
    same = [run for run in runs if _has_settings(run.recipe, recipe)]
    return next((run for run in same if run.finished), same[-1] if same else None)


def _has_settings(recorded: Recipe, recipe: Recipe) -> bool:
    if any(getattr(recorded, name) != getattr(recipe, name) for name in NUMBERS):  # in a fraction of the time
        return False
    same: dict[str, Any] = {name: getattr(recorded, name) for name in IGNORED}
    same["probe"] = recipe.probe or recorded.probe
    return absolute_paths(dataclasses.replace(recipe, **same)) == absolute_paths(recorded)


def scores_of(run: Found | None) -> list[Score]:
    """The models of a run; none while it is not finished."""
    if run is None:
        return []
    results, epochs = read_results(run.folder), read_metrics(run.folder)
    scores = []
    for name, facts in results.items():
        metric = score_name(facts.get("metric"))
        epoch = 1 if facts["kept_epoch"] is None else facts["kept_epoch"]  # the one record of a linear probe
        kept = [record for record in epochs if (record["model"], record.get("epoch")) == (name, epoch)]
        # epoch 0 has no record in runs of earlier versions
        val = facts.get("kept_score") if facts.get("selected_on") == "val" else None
        if val is None and kept:
            val = kept[0].get(f"val_{metric}")
        scores.append(Score(name, val, facts[f"test_{metric}"], facts))
    return scores


def with_one_probe(entries: Sequence[Entry], runs: Sequence[Found] = ()) -> list[Entry]:
    """The entries, of which only one of those with the same linear probe fits it; others that fit it alone go.

    It is the one of them for which the least is trained again, in view of ``runs``; of several the first.
    """
    sharing: dict[tuple[Any, ...], list[Entry]] = {}
    for entry in entries:
        if any(candidate.method == LINEAR for candidate in candidates_of(entry.recipe)):
            sharing.setdefault(_key_of_probe(entry.recipe), []).append(entry)
    fitting = {key: min(same, key=lambda entry: _repeated(entry.recipe, runs)) for key, same in sharing.items()}
    changed = []
    for entry in entries:
        fits = fitting.get(_key_of_probe(entry.recipe), entry)
        if entry.recipe.method == LINEAR and fits is not entry:
            continue
        if entry.recipe.probe and fits is not entry:
            recipe = dataclasses.replace(entry.recipe, probe=False)
            entry = entry._replace(recipe=recipe, arguments=[*entry.arguments, "--no-probe"])
        changed.append(entry)
    return changed


def _key_of_probe(recipe: Recipe) -> tuple[Any, ...]:
    return tuple(getattr(recipe, name) for name in PROBE_SETTINGS)


def _repeated(recipe: Recipe, runs: Sequence[Found]) -> tuple[bool, ...]:
    """How much is trained again if the run of a recipe fits the probe: the smaller, the less.

    Nothing, where a finished run has it; then where an interrupted one does; then where there is no run yet.
    """
    own, without = find_run(runs, recipe), find_run(runs, dataclasses.replace(recipe, probe=False))
    return not (own and own.finished), own is None, without is not None, bool(without and without.finished)


def settings_of_probe(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the varied settings that a linear probe depends on, or may: a recipe has any."""
    return {name: value for name, value in values.items() if name in (*PROBE_SETTINGS, "recipe")}
