"""Lists as tables: comma-separated or tab-separated values, with or without a header."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from insvp_fast.data.decode import SUFFIXES
from insvp_fast.data.sets import split_of

__all__ = ["Listed", "delimiter_of", "parse_table"]

PATHS = ("path", "file", "file_name", "filename", "filepath", "file_path", "image", "image_path", "img_path")
LABELS = ("label", "labels", "class", "class_name", "category", "target", "tags")
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "data_set")
INDICES = ("", "index", "unnamed:_0")  # a column of row numbers, as pandas writes it
SEPARATOR = re.compile("[;|]")  # of the labels of one image


class Listed(NamedTuple):
    """An image of a list."""

    path: str
    labels: tuple[str, ...]  # one, except in a table where images have several labels or none
    split: str | None = None  # train, val or test, if the table has a column for it


def delimiter_of(text: str, suffix: str) -> str | None:
    """What separates the columns of a table; None for a text file that is none."""
    line = text.partition("\n")[0]
    if "\t" in line or suffix == ".tsv":
        return "\t"
    if suffix != ".csv":
        return None
    return ";" if ";" in line and "," not in line else ","  # spreadsheets write semicolons in many countries


def parse_table(text: str, delimiter: str) -> tuple[list[Listed], list[str] | None]:
    """The images of a table; and the names of the classes, if it has a column of 0 and 1 for each, else None.

    The first row is a header if none of its cells ends like an image file. Several labels of an image are separated by
    ``;`` or ``|``.

    Raises:
        ValueError: saying in which line or column what is wrong.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    header = None
    if rows and not any(map(_is_image, rows[0][1])):
        header = rows.pop(0)[1]
    if not rows:
        return [], None
    width = len(header or rows[0][1])
    for number, row in rows:
        if len(row) != width:
            raise ValueError(f"line {number} has {len(row)} columns, the first has {width}")
    path, labels, split = _columns(header, rows[0][1])
    classes = [header[column] for column in labels] if header and len(labels) > 1 else None
    images = []
    for number, row in rows:
        names = _labels(row[labels[0]]) if classes is None else _marked(classes, [row[column] for column in labels])
        if names is None:
            cells = zip(classes or (), [row[column] for column in labels], strict=True)
            column, cell = next((name, cell) for name, cell in cells if _marked([name], [cell]) is None)
            expected = f"expected 0 or 1, or one column of labels with a name among {', '.join(LABELS)}"
            raise ValueError(f"line {number}: found {cell!r} in the column {column!r}: {expected}")
        if split is not None and split_of(row[split]) is None:
            raise ValueError(f"line {number}: found the split {row[split]!r}: expected train, val or test")
        images.append(Listed(row[path], names, None if split is None else split_of(row[split])))
    return images, classes


def _columns(header: list[str] | None, row: list[str]) -> tuple[int, list[int], int | None]:
    """The columns of the path, of the label (or one of each class) and of the split; ``row`` is the first of an image.

    Without a header these are the path, a label, and perhaps a split.
    """
    names = [re.sub(r"\s+", "_", name.lower()) for name in header or map("column {}".format, range(len(row)))]
    images = [column for column, cell in enumerate(row) if _is_image(cell)]
    path = next((names.index(name) for name in PATHS if name in names), images[0] if images else None)
    split = next((names.index(name) for name in SPLIT_COLUMNS if name in names), None)
    others = [n for n in range(len(row)) if n not in (path, split) and names[n] not in INDICES]
    if header is None and len(others) == 2:
        split = others.pop()
    label = next((names.index(name) for name in LABELS if name in names), None)
    if path is None or not others or (header is None and len(others) > 1):
        found = ", ".join(header) if header else f"{len(row)} columns"
        raise ValueError(f"found {found}: expected the columns path, label and, if there is one, split")
    return path, others if label is None else [label], split


def _labels(cell: str) -> tuple[str, ...]:
    return tuple(label for part in SEPARATOR.split(cell) if (label := part.strip()))


def _marked(classes: Sequence[str], cells: Sequence[str]) -> tuple[str, ...] | None:
    """The classes whose cell is 1; None if a cell is neither 0 nor 1."""
    marks = {"0": False, "0.0": False, "1": True, "1.0": True}
    if not set(cells) <= marks.keys():
        return None
    return tuple(name for name, cell in zip(classes, cells, strict=True) if marks[cell])


def _is_image(cell: str) -> bool:
    return cell.lower().endswith(SUFFIXES)
