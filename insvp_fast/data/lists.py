"""Lists of images and labels: ``path label`` lines, or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from insvp_fast.errors import DataError

__all__ = ["PARTS", "Pairs", "by_number", "indices_of", "read_list", "siblings", "some"]

PARTS = ("train", "val", "test")
Pairs = list[tuple[str, str]]  # path, label


def read_list(file: Path) -> Pairs:
    """(path, label) of each image in a list file; a label is what the file says, as text.

    The file holds ``path label`` lines, or JSON: an object path -> label, or an array of [path, label, ...], of which
    the first label counts.

    Raises:
        DataError: naming the file and what in it was not understood.
    """
    try:
        text = file.read_text(encoding="utf-8")
        pairs = _from_json(json.loads(text)) if file.suffix == ".json" else _from_lines(text)
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: not a list of images that can be read ({error})") from error
    if not pairs:
        raise DataError(f"{file}: found an empty list, expected images and labels")
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
        known = isinstance(entry, list | tuple) and len(entry) >= 2
        if not (known and isinstance(entry[0], str) and isinstance(entry[1], int | str)):
            raise ValueError(f"found {str(entry)[:60]}: expected an object path -> label, or an array of [path, label]")
    return [(entry[0], str(entry[1])) for entry in entries]


def by_number(labels: Iterable[str]) -> list[str]:
    """The distinct labels, sorted: by value if all are numbers, else as text."""
    distinct = set(labels)
    return sorted(distinct, key=int) if all(label.isdecimal() for label in distinct) else sorted(distinct)


def indices_of(labels: Sequence[str], classes: Sequence[str], where: object) -> list[int]:
    """The class index of each label.

    Raises:
        DataError: if a label is none of the classes.
    """
    index: Mapping[str, int] = {label: i for i, label in enumerate(classes)}
    unknown = by_number(set(labels) - set(index))
    if unknown:
        known = f"the {len(index)} classes of train: {some(classes)}"
        raise DataError(f"{where}: found the class {some(unknown)}, expected some of {known}")
    return [index[label] for label in labels]


def siblings(source: Path) -> dict[str, Path]:
    """The list files of the parts: ``source`` and the files beside it that are named alike, or those in a folder.

    Of ``a/train_1.txt`` the siblings are ``a/val_1.txt`` and ``a/test_1.txt``; a folder's are ``train``, ``val`` and
    ``test`` with .txt or .json. A list that is not called train stands alone, as test.
    """
    names = {part: source.with_name(source.name.replace("train", part)) for part in PARTS}
    if source.is_dir():
        names = {p: file for suffix in (".txt", ".json") for p in PARTS if (file := source / (p + suffix)).is_file()}
    elif "train" not in source.name:
        return {"test": source}
    return {part: file for part, file in names.items() if file.is_file()}


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
