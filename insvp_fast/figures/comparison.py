"""Pictures that compare accuracies: of methods, and of settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.text import Annotation
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Bbox

from insvp_fast.figures.style import COLORS, HIGHLIGHT, drawing

__all__ = ["plot_parameters", "plot_sensitivity"]

OWN = "InsVP"  # the method that is set off from the others
STEPS = 7  # up to how many times its own height away from its point a label may be


def plot_parameters(rows: Sequence[tuple[str, int, float, float]], file: str | Path, title: str = "") -> None:
    """Accuracy against the number of trained parameters on a logarithmic axis, a labeled point for each method.

    Args:
        rows: of (name, trained parameters, mean accuracy, its standard deviation over seeds), accuracies in [0, 1].
    """
    with drawing(file, 6.4, 4.2) as figure:
        axes = figure.subplots()
        axes.set(xscale="log", xlabel="trained parameters, head included", ylabel="accuracy", title=title)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        for name, parameters, mean, deviation in rows:
            own = name.startswith(OWN)
            color, marker = (HIGHLIGHT, "D") if own else (COLORS[0], "o")
            axes.errorbar(parameters, mean, deviation, color=color, marker=marker, ms=7 if own else 5, capsize=2, lw=1)
        axes.margins(0.08)
        figure.draw_without_rendering()  # places the axes, which the sizes of the labels depend on
        figure.set_layout_engine("none")
        _label_points(axes, [(name, parameters, mean) for name, parameters, mean, _ in rows])


def plot_sensitivity(panels: Mapping[str, Sequence[tuple[float, float, float]]], file: str | Path) -> None:
    """Accuracy over the values of settings: a panel for each setting, with a band of one standard deviation.

    Args:
        panels: by the setting's name, rows of (value, mean accuracy, its standard deviation over seeds), accuracies in
            [0, 1]. All panels have the same vertical axis.
    """
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = -(-len(panels) // columns)
    with drawing(file, 3.3 * columns + 0.3, 2.5 * lines + 0.2) as figure:
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
        for axes, (setting, unsorted) in zip(grid, panels.items(), strict=False):
            values, means, deviations = zip(*sorted(unsorted), strict=True)
            low, high = (
                [mean + sign * deviation for mean, deviation in zip(means, deviations, strict=True)] for sign in (-1, 1)
            )
            axes.fill_between(values, low, high, color=COLORS[0], alpha=0.2, linewidth=0)
            axes.plot(values, means, color=COLORS[0], marker="o")
            axes.set(xlabel=setting, xticks=values)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        for axes in list(grid):
            axes.set_visible(False)
        figure.supylabel("accuracy, mean and standard deviation over seeds", fontsize=9)


def _label_points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write a name beside each point, at the nearest place where it covers no point and no other name."""
    places = [axes.transData.transform((x, y)) for _, x, y in points]
    taken = [Bbox.from_extents(x - 9, y - 9, x + 9, y + 9) for x, y in places]
    for (name, x, y), own in zip(points, list(taken), strict=True):
        label = _best_place(axes, name, (x, y), [box for box in taken if box is not own])
        taken.append(label.get_window_extent())


def _best_place(axes: Axes, name: str, point: tuple[float, float], taken: Sequence[Bbox]) -> Annotation:
    own = name.startswith(OWN)
    label = axes.annotate(
        name,
        point,
        textcoords="offset points",
        fontsize=8,
        va="center",
        color=HIGHLIGHT if own else "black",
        weight="bold" if own else "normal",
        arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.6, "shrinkA": 0, "shrinkB": 4},
    )
    inside = axes.get_window_extent()
    for offset, alignment in _offsets():
        label.set(position=offset, horizontalalignment=alignment)
        box = label.get_window_extent()
        if inside.containsx(box.x0) and inside.containsx(box.x1) and inside.containsy(box.y0):
            if not any(box.overlaps(other) for other in taken) and inside.containsy(box.y1):
                return label
    label.set(position=(7, 0), horizontalalignment="left")
    return label


def _offsets() -> Iterator[tuple[tuple[float, float], str]]:
    """Offsets of a label from its point, in points, with its alignment, the nearest first."""
    steps = range(-STEPS, STEPS + 1)
    offsets = [(9.0 * right, 9.0 * up) for right, up in product((-4, -2, -1, 0, 1, 2, 4), steps) if right or abs(up) > 0]
    for right, up in sorted(offsets, key=lambda offset: (abs(offset[0]) + abs(offset[1]), -offset[0])):
        yield (right, up), "left" if right > 0 else "right" if right < 0 else "center"
