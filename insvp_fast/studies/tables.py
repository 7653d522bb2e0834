"""Means, deviations and paired differences over seeds, as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from insvp_fast.atomic_files import write_file

__all__ = ["format_percent", "markdown", "mean_and_std", "paired_difference", "write_table"]

CONFIDENCE = 0.95


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation, None of a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float | None]:
    """The mean of ``values - others``, pair by pair, and half the width of its 95 % confidence interval.

    The interval is Student's: the differences of few seeds are taken to be normal. None for a single pair.
    """
    differences = [a - b for a, b in zip(values, others, strict=True)]
    mean, std = mean_and_std(differences)
    if std is None:
        return mean, None
    from scipy.stats import t  # 100 ms

    count = len(differences)
    return mean, float(t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * std / math.sqrt(count)


def format_percent(mean: float | None, spread: float | None = None, sign: bool = False) -> str:
    """``91.32 ± 0.40``, of fractions; a dash for None."""
    if mean is None:
        return "–"
    text = f"{100 * mean:+.2f}" if sign else f"{100 * mean:.2f}"
    return text if spread is None else f"{text} ± {100 * spread:.2f}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table; columns are aligned for those who read the text."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    lines.insert(1, " | ".join("-" * max(3, width) for width in widths))
    return "".join(f"| {line} |\n" for line in lines)


def write_table(folder: Path, name: str, header: Sequence[str], rows: Sequence[Sequence[object]], text: str) -> None:
    """Write ``name.csv`` with the rows and ``name.md`` with the text."""
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerows([header, *rows])
    write_file(folder / f"{name}.csv", content.getvalue().encode())
    write_file(folder / f"{name}.md", text.encode())
