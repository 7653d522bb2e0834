"""Pictures of a run: learning curves and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from insvp_fast.figures.style import COLORS, SEQUENTIAL, drawable, drawing

__all__ = ["TITLES", "plot_confusion", "plot_curves"]

MAX_NAMED = 40  # with more classes, their names beside a confusion matrix could not be read
TITLES = {  # of panels, axes and tables, by the names of scores in records
    "accuracy": "accuracy",
    "map": "mean average precision",
    "mean_per_class": "mean accuracy per class",
    "f1": "macro F1",
}
LOSSES = {"loss": ("training", "-"), "val_loss": ("validation", "--")}  # what is drawn how


def plot_curves(records: Sequence[dict[str, Any]], file: Path, metric: str = "accuracy") -> None:
    """Losses, accuracies and what selects the epoch to keep, over the epochs; a color for each model.

    A model with one record, which has no epochs to speak of, is a horizontal line. What no record holds is left out.

    Args:
        records: of the epochs, as in ``metrics.jsonl``.
        metric: the name in records of the score by which an epoch is kept.
    """
    scores = {
        TITLES[name]: {f"val_{name}": ("validation", "-"), f"test_{name}": ("test", "--")}
        for name in dict.fromkeys(("accuracy", "map", metric))
    }
    held = {
        title: {key: how for key, how in curves.items() if any(record.get(key) is not None for record in records)}
        for title, curves in {"loss": LOSSES, **scores}.items()
    }
    panels = {title: curves for title, curves in held.items() if curves}
    models = list(dict.fromkeys(record["model"] for record in records))
    with drawing(file, 4.2 * len(panels), 3.2) as figure:
        for axes, (title, curves) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            for key, (split, line) in curves.items():
                for model, color in zip(models, cycle(COLORS), strict=False):
                    own = [record for record in records if record["model"] == model]
                    _draw_curve(axes, own, key, color=color, linestyle=line, label=f"{model}, {split}")
            axes.set(xlabel="epoch", title=title)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if title != "loss":
                axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
            axes.legend()


def _draw_curve(axes: Axes, records: Sequence[dict[str, Any]], key: str, **style: Any) -> None:
    points = [(record["epoch"], record[key]) for record in records if record.get(key) is not None]
    if points and len(records) == 1:
        axes.axhline(points[0][1], **style)
    elif points:
        axes.plot(*zip(*points, strict=True), marker="o", **style)


def plot_confusion(confusion: Tensor, class_names: Sequence[str], file: Path) -> None:
    """The confusion matrix [true class, predicted class], each row normalized to 1; with few classes, labeled."""
    fractions = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    names, classes = list(map(drawable, class_names)), len(class_names)
    side = min(12.0, 3 + 0.3 * classes)
    with drawing(file, side + 0.8, side) as figure:
        axes = figure.subplots()
        axes.grid(False)
        image = axes.imshow(fractions.numpy(), vmin=0, vmax=1, cmap=SEQUENTIAL)
        axes.set(xlabel="predicted class", ylabel="true class", title="confusion matrix")
        if classes <= MAX_NAMED:
            axes.set_xticks(range(classes), names, rotation=90, fontsize=7)
            axes.set_yticks(range(classes), names, fontsize=7)
            for row, column in confusion.nonzero().tolist():
                color = "black" if fractions[row, column] > 0.6 else "white"
                count = str(int(confusion[row, column]))
                axes.text(column, row, count, ha="center", va="center", fontsize=7, color=color)
        bar = figure.colorbar(image, shrink=0.8, format=PercentFormatter(1))
        bar.set_label("of the true class's images")
