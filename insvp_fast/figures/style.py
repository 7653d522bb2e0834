"""The style of all pictures."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names

from insvp_fast.atomic_files import replace_file
from insvp_fast.errors import warn

__all__ = ["COLORS", "HIGHLIGHT", "MARKERS", "SEQUENTIAL", "drawable", "drawing", "printable"]

# Okabe and Ito's colors, which the color-blind can tell apart, without yellow, which is too light for lines
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HIGHLIGHT = COLORS[1]
MARKERS = ("o", "^", "s")  # with the colors, they tell 21 classes apart
SEQUENTIAL = "viridis"
# for the characters that matplotlib's own font lacks, such as Chinese names of classes, where one is installed
FALLBACKS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "Microsoft YaHei", "SimHei")
GLYPH = r"Glyph (\d+) .*missing from "  # what matplotlib warns of, once for each character and picture
_told: set[str] = set()  # the characters that users know of
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.prop_cycle": f"cycler('color', {list(COLORS)})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.facecolor": "white",  # opaque, so that black text is read on a dark page too
    "figure.titlesize": 11,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.markersize": 4,
    "pdf.fonttype": 42,  # letters that other programs can edit
    "savefig.dpi": 150,
    "text.parse_math": False,  # a dollar sign in the name of a class is one
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


def printable(text: str) -> str:
    """A text in which bytes and characters that cannot be shown are escaped."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def drawable(name: str, most: int = 40) -> str:
    """A name of a class or file as it is drawn: printable, and cut if it is long."""
    text = printable(name)
    return text if len(text) <= most else f"{text[: most - 1]}…"


@contextmanager
def drawing(file: str | Path, width: float, height: float) -> Iterator[Figure]:
    """An empty figure to draw on, in inches; afterwards it is written, whole or not at all.

    Args:
        file: its name ends in ``.png``, ``.pdf`` or ``.svg``.
    """
    file = Path(file)
    fonts = ["sans-serif", *(name for name in FALLBACKS if name in get_font_names())]
    with _missing_characters(), rc_context(STYLE | {"font.family": fonts}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replace_file(file) as stream:
            figure.savefig(stream, format=file.suffix[1:] or "png")


@contextmanager
def _missing_characters() -> Iterator[None]:
    """Warn once of characters that are drawn as boxes, instead of matplotlib, which warns of each in each picture."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", GLYPH)
        yield
    missing = {chr(int(found[1])) for one in caught if (found := re.match(GLYPH, str(one.message)))}
    for one in caught:
        if not re.match(GLYPH, str(one.message)):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    if new := sorted(missing - _told):
        _told.update(new)
        some = "".join(new[:20]) + "…" * (len(new) > 20)
        warn(f"no installed font has {some}, drawn as boxes: expected one of {', '.join(FALLBACKS)}")
