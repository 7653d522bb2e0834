"""The page of a report: what a run's files and the test of its model say, in HTML without scripts or outside files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jinja2
from torch import Tensor

from insvp_fast.figures.prompts import pictures_of
from insvp_fast.figures.runs import plot_confusion, plot_curves
from insvp_fast.figures.style import printable
from insvp_fast.figures.web import data_uri, encode_picture
from insvp_fast.probabilities import LEAST_PROBABILITY
from insvp_fast.report.results import Mistakes, Results
from insvp_fast.training.metrics import Metrics
from insvp_fast.training.recipe import Recipe, score_name
from insvp_fast.training.run_folder import read_config, read_metrics

__all__ = ["render"]

MAX_ROWS = 50  # of the table of classes
MAX_CONFUSIONS = 10
SCORES = {  # of results, with their titles
    "test_accuracy": "top-1",
    "test_mean_per_class": "mean per class",
    "test_map": "mAP",
    "test_f1": "F1",
    "test_f1_micro": "micro F1",
}


class _Picture(NamedTuple):
    title: str
    note: str
    source: str  # a data URI


class _Mistake(NamedTuple):
    file: str
    true: str
    predicted: str
    loss: float
    pictures: list[_Picture]


class _Class(NamedTuple):
    name: str
    images: int | None
    score: float | None
    mistaken_for: str


def render(folder: str | Path, results: Results, warnings: list[str]) -> str:
    """The page of a run.

    Args:
        warnings: what readers should know before they believe the figures.

    Raises:
        TrainingError: if it is no run folder.
    """
    folder = Path(folder)
    recipe, config = read_config(folder)
    records, metrics = read_metrics(folder), results.metrics
    epochs = [record for record in records if "trained_parameters" not in record]
    names, confusion = results.class_names, metrics.confusion if isinstance(metrics, Metrics) else None
    metric = score_name(recipe.metric_for(multi_label=confusion is None))
    classes = _classes(metrics.per_class, confusion, names)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("insvp_fast.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: "–" if share is None else f"{share:.1%}"
    return environment.get_template("page.html").render(
        name=folder.resolve().name,
        recipe=recipe,
        warnings=warnings,
        metrics=metrics,
        wrong=results.wrong,
        scores=SCORES,
        models=[record for record in records if "trained_parameters" in record],
        curves=_svg(lambda file: plot_curves(epochs, file, metric)) if epochs else None,
        confusion=None if confusion is None else _svg(lambda file: plot_confusion(confusion, names, file)),
        confusions=[] if confusion is None else _confusions(confusion, names),
        classes=classes[:MAX_ROWS],
        tested=len(classes),
        class_count=len(names),
        mistakes=_mistakes(results),
        reason=results.mistakes.reason,
        settings=_settings(recipe),
        facts=_facts(config),
    )


def _svg(plot: Callable[[Path], None]) -> str:
    with TemporaryDirectory() as folder:
        plot(file := Path(folder, "figure.svg"))
        return data_uri(file.read_bytes(), "svg+xml")


def _confusions(confusion: Tensor, names: list[str]) -> list[tuple[str, str, int, float]]:
    """The most frequent confusions: true and predicted class, their number, and their share of the true class."""
    wrong, totals = confusion.clone().fill_diagonal_(0), confusion.sum(1)
    pairs = wrong.nonzero()
    counts, order = wrong[pairs[:, 0], pairs[:, 1]].sort(descending=True, stable=True)
    most = zip(counts[:MAX_CONFUSIONS].tolist(), pairs[order[:MAX_CONFUSIONS]].tolist(), strict=True)
    return [(names[true], names[predicted], count, count / int(totals[true])) for count, (true, predicted) in most]


def _classes(scores: list[float | None], confusion: Tensor | None, names: list[str]) -> list[_Class]:
    """A row for each class with images, the worst first."""
    rows = []
    for index, (name, score) in enumerate(zip(names, scores, strict=True)):
        images, mistaken_for = None, ""
        if confusion is not None:
            own = confusion[index].clone()
            images = int(own.sum())
            own[index] = 0
            mistaken_for = names[int(own.argmax())] if own.any() else ""
        if score is not None:
            rows.append(_Class(name, images, score, mistaken_for))
    return sorted(rows, key=lambda row: row.score or 0.0)


def _mistakes(results: Results) -> list[_Mistake]:
    mistakes, names = results.mistakes, results.class_names
    if mistakes.shown is None:
        return []
    columns = pictures_of(mistakes.shown, results.preprocessing)
    found = []
    for i, (file, loss) in enumerate(zip(mistakes.names, mistakes.losses, strict=True)):
        pictures = [
            _Picture(title.replace("\n", " "), notes[i] if notes else "", encode_picture(images[i]))
            for title, (images, notes) in columns.items()
        ]
        found.append(_Mistake(file, *_labels(mistakes, i, names), loss, pictures))
    return found


def _labels(mistakes: Mistakes, i: int, names: list[str]) -> tuple[str, str]:
    """The true and the predicted class of a mistake with their probabilities; of several labels, all of them."""
    probabilities = mistakes.shown.probabilities[i]  # type: ignore[union-attr]
    target = mistakes.targets[i]
    if target.ndim == 0:
        true, predicted = [int(target)], [int(probabilities.argmax())]
    else:
        true, predicted = (hot.nonzero()[:, 0].tolist() for hot in (target > 0.5, probabilities >= LEAST_PROBABILITY))
    words = [", ".join(f"{names[k]} ({probabilities[k]:.1%})" for k in found) for found in (true, predicted)]
    return words[0] or "none", words[1] or "none"


def _settings(recipe: Recipe) -> list[tuple[str, str, bool]]:
    """Name and value of each setting, and whether it is not the default; those first."""
    fields = dataclasses.fields(Recipe)
    rows = [(f.name, _words(getattr(recipe, f.name)), getattr(recipe, f.name) != f.default) for f in fields]
    return sorted(rows, key=lambda row: not row[2])


def _facts(config: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """What config.json records besides the settings, by title; runs of older versions record less."""
    titles = {
        "Data": ("images", "protocol", "multi_label", "selected_on", "working_folder", "command"),
        "Images": ("preprocessing", "augmentation"),
        "Prompts": ("insvp",),
        "Versions": ("versions", "device", "processes"),
    }
    facts = {title: list(_rows({key: config[key] for key in keys if key in config})) for title, keys in titles.items()}
    return {title: rows for title, rows in facts.items() if rows}


def _rows(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values, those of nested objects too."""
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _rows({key if name == "versions" else f"{name}: {key}": v for key, v in value.items()})
        elif value is not None:
            yield name.replace("_", " "), _words(value)


def _words(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value)) or "–"
    return value if isinstance(value, str) else json.dumps(value)
