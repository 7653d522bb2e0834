"""Lists of images and labels: text files of ``path label`` lines, or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from insvp_fast.data.sets import SPLITS
from insvp_fast.errors import DataError

__all__ = ["Pairs", "abbreviated", "class_indices", "find_lists", "read_list", "sorted_labels"]

Pairs = list[tuple[str, str]]  # (path, label) of each image


def read_list(file: Path) -> Pairs:
    """Read the (path, label) of each image in a list file; labels are text, as the file has them.

    The file holds ``path label`` lines, or JSON: an object path -> label, or an array of [path, label, ...], of which
    the first label counts.

    Raises:
        DataError: naming the file and what is wrong in it.
    """
    try:
        text = file.read_text(encoding="utf-8")
        pairs = _from_json(json.loads(text)) if file.suffix == ".json" else _from_lines(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a list of images that can be read ({error})") from error
    if not pairs:
        raise DataError(f"{file}: found an empty list: expected images and labels")
    return pairs


def _from_lines(text: str) -> Pairs:
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            path, _, label = line.strip().rpartition(" ")  # the path may hold spaces
            if not path:
                raise ValueError(f"line {number} is {line.strip()!r}: expected `path label`")
            pairs.append((path.strip(), label))
    return pairs


def _from_json(content: Any) -> Pairs:
    entries = list(content.items()) if isinstance(content, dict) else content
    for entry in entries if isinstance(entries, list) else [entries]:
        is_pair = isinstance(entry, list | tuple) and len(entry) >= 2
        if not (is_pair and isinstance(entry[0], str) and isinstance(entry[1], int | str)):
            raise ValueError(f"found {str(entry)[:60]}: expected an object path -> label, or an array of [path, label]")
    return [(entry[0], str(entry[1])) for entry in entries]


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """The distinct labels, sorted by value if all are numbers, else as text."""
    distinct = set(labels)
    return sorted(distinct, key=int) if all(label.isdecimal() for label in distinct) else sorted(distinct)


def class_indices(labels: Sequence[str], classes: Sequence[str], where: object) -> list[int]:
    """The class index of each label.

    Args:
        where: what messages name as the place of the labels.

    Raises:
        DataError: if a label is not one of the classes.
    """
    index = {label: i for i, label in enumerate(classes)}
    unknown = sorted_labels(set(labels) - set(index))
    if unknown:
        known = f"the {len(index)} classes of train: {abbreviated(classes)}"
        raise DataError(f"{where}: found the class {abbreviated(unknown)}: expected some of {known}")
    return [index[label] for label in labels]


def find_lists(source: Path) -> dict[str, Path]:
    """Find the list file of each split, given one of them or their folder.

    Beside ``a/train_1.txt`` these are ``a/val_1.txt`` and ``a/test_1.txt``; in a folder ``train``, ``val`` and ``test``
    with .txt or .json. A list without "train" in its name stands alone, as test.
    """
    names = {split: source.with_name(source.name.replace("train", split)) for split in SPLITS}
    if source.is_dir():
        names = {s: file for suffix in (".txt", ".json") for s in SPLITS if (file := source / (s + suffix)).is_file()}
    elif "train" not in source.name:
        return {"test": source}
    return {split: file for split, file in names.items() if file.is_file()}


def abbreviated(names: Sequence[str]) -> str:
    """The first six names, and how many more there are."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
