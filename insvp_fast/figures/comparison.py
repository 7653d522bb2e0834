"""Pictures that compare accuracies: of methods, and of settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, PercentFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from insvp_fast.figures.style import COLORS, HIGHLIGHT, drawing

__all__ = ["plot_parameters", "plot_sensitivity"]

OWN = "InsVP"  # the method that is set off from the others
NEAR = 12  # points between a name and its point, above which a line joins them
BESIDE = 6  # points from the middle of a name to where a line ends that comes from straight above or below
COLUMNS, LINES = (-48, -32, -16, -8, 0, 8, 16, 32, 48), range(-72, 73, 6)
OFFSETS = sorted(  # of a name from its point, in points, the nearest first
    (place for place in product(COLUMNS, LINES) if place[0] or abs(place[1]) > 6),
    key=lambda place: (math.hypot(*place), -place[0]),
)


def plot_parameters(
    rows: Sequence[tuple[str, int, float, float | None]],
    file: str | Path,
    title: str = "",
    measured: str = "accuracy",
) -> None:
    """Accuracy against the number of trained parameters on a logarithmic axis, a labeled point for each method.

    Args:
        rows: of (name, trained parameters, mean accuracy, its standard deviation over seeds), accuracies in [0, 1]; a
            deviation of None has no error bar.
        measured: what stands at the vertical axis, where it is another score than the accuracy.
    """
    with drawing(file, 6.4, 4.2) as figure:
        axes = figure.subplots()
        axes.set(xscale="log", xlabel="trained parameters, head included", ylabel=measured, title=title)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))  # powers of ten need formulas, which are off
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        for name, parameters, mean, deviation in rows:
            own = name.startswith(OWN)
            color, marker = (HIGHLIGHT, "D") if own else (COLORS[0], "o")
            axes.errorbar(parameters, mean, deviation, color=color, marker=marker, ms=7 if own else 5, capsize=2, lw=1)
        axes.margins(0.08)
        least, most = (choose(parameters for _, parameters, *_ in rows) for choose in (min, max))
        if least == most:  # an axis needs two ends
            axes.set_xlim(least / 2, 2 * most)
        figure.draw_without_rendering()  # places the axes, and with them the points
        figure.set_layout_engine("none")
        _label_points(axes, rows)


def plot_sensitivity(
    panels: Mapping[str, Sequence[tuple[float, float, float | None]]], file: str | Path, measured: str = "accuracy"
) -> None:
    """Accuracy over the values of settings: a panel for each setting, with a band of one standard deviation.

    Args:
        panels: by the setting's name, rows of (value, mean accuracy, its standard deviation over seeds), accuracies in
            [0, 1]; a deviation of None widens no band. All panels have the same vertical axis.
        measured: as of ``plot_parameters``.
    """
    deviates = any(deviation is not None for rows in panels.values() for *_, deviation in rows)
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    lines = -(-len(panels) // columns)
    with drawing(file, 3.3 * columns + 0.3, 2.5 * lines + 0.2) as figure:
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
        for axes, (setting, unsorted) in zip(grid, panels.items(), strict=False):
            values, means, deviations = zip(*sorted(unsorted), strict=True)
            low, high = (
                [mean + sign * (deviation or 0) for mean, deviation in zip(means, deviations, strict=True)]
                for sign in (-1, 1)
            )
            axes.fill_between(values, low, high, color=COLORS[0], alpha=0.2, linewidth=0)
            axes.plot(values, means, color=COLORS[0], marker="o")
            axes.set(xlabel=setting, xticks=values)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        for axes in list(grid):
            axes.set_visible(False)
        figure.supylabel(measured + "\nmean and standard deviation over seeds" * deviates, fontsize=9)


def _label_points(axes: Axes, rows: Sequence[tuple[str, int, float, float | None]]) -> None:
    """Write a name beside each point, where it covers no point, other name or, if there is such a place, error bar."""
    to_pixels, size = axes.transData.transform, 16
    points = [Bbox([to_pixels((x, y)) - size / 2, to_pixels((x, y)) + size / 2]) for _, x, y, _ in rows]
    bars = [Bbox([to_pixels((x, y - (bar or 0))), to_pixels((x, y + (bar or 0)))]) for _, x, y, bar in rows]
    names: list[Bbox] = []
    for i, (name, x, y, _) in enumerate(rows):
        color, weight = (HIGHLIGHT, "bold") if name.startswith(OWN) else ("black", "normal")
        label = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", color=color, weight=weight)
        label.set(ha="center", va="center", fontsize=8)
        free = [*points[:i], *points[i + 1 :], *names]
        offset, box = _best_place(label.get_window_extent(), axes, free, bars)
        label.set(position=offset, ha="left" if offset[0] > 0 else "right" if offset[0] < 0 else "center")
        names.append(box)
        if math.hypot(*offset) > NEAR:
            line = {"arrowstyle": "-", "color": "0.6", "lw": 0.6, "shrinkA": 0 if offset[0] else BESIDE, "shrinkB": 3}
            axes.annotate("", (x, y), offset, textcoords="offset points", arrowprops=line)


def _best_place(box: Bbox, axes: Axes, free: Sequence[Bbox], bars: Sequence[Bbox]) -> tuple[tuple[float, float], Bbox]:
    """The best offset, in points, of a box that lies on its point, and the box there; of equal ones the nearest."""
    pixels = axes.figure.dpi / 72

    def moved(offset: tuple[float, float]) -> Bbox:
        right, up = offset
        return box.translated(pixels * right + math.copysign(box.width / 2, right) * (right != 0), pixels * up)

    def faults(offset: tuple[float, float]) -> tuple[int, int]:
        there = moved(offset)
        outside = 4 - axes.bbox.count_contains(there.corners())
        return outside + there.count_overlaps(free), there.count_overlaps(bars)

    best = min(OFFSETS, key=faults)
    return best, moved(best)
