"""Lists of images and labels: text files of ``path label`` lines, JSON, or tables."""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from insvp_fast.data.sets import SPLITS, split_of
from insvp_fast.data.tables import Listed, delimiter_of, parse_table
from insvp_fast.errors import DataError

__all__ = [
    "Lists",
    "Pairs",
    "abbreviated",
    "class_indices",
    "escaped",
    "find_lists",
    "read_list",
    "read_lists",
    "sorted_labels",
]

Pairs = list[tuple[str, str]]  # (path, label) of each image
LIST_SUFFIXES = (".txt", ".json", ".csv", ".tsv")


class Lists(NamedTuple):
    """What the lists of a data set hold."""

    splits: dict[str, tuple[Path, list[Listed]]]  # the file of each split, and its images
    classes: list[str] | None  # the names of the classes, if a table has a column for each
    multi_label: bool  # whether an image may have several labels


def read_lists(files: Mapping[str, Path], root: str | None = None) -> Lists:
    """Read the list of each split, or divide a single table by its column of splits; labels are text, as in the file.

    Args:
        root: the folder that paths are relative to; None for that of their list.

    Raises:
        DataError: naming the file and what is wrong in it, or if the labels are measurements instead of classes.
    """
    found = {split: (file, *_read(file)) for split, file in files.items()}
    images = [image for _, listed, _ in found.values() for image in listed]
    classes = next((names for _, _, names in found.values() if names), None)
    multi_label = classes is not None or any(len(image.labels) > 1 for image in images)
    source = next(iter(files.values()))
    for file, listed, _ in found.values():
        _check_repetitions(file, listed, root or file.parent)
    if not multi_label:
        _check_labels(source, images)
    splits = {split: (file, listed) for split, (file, listed, _) in found.items()}
    named = {image.split for image in images} - {None}
    if named and len(files) > 1:
        raise DataError(f"{source}: found a column of splits in one of {len(files)} lists: expected one list then")
    if named:
        splits = {s: (source, [image for image in images if image.split == s]) for s in SPLITS if s in named}
    return Lists(splits, classes, multi_label)


def _read(file: Path) -> tuple[list[Listed], list[str] | None]:
    """The images of a list file, and the names of the classes if it has a column for each."""
    if file.suffix.lower() == ".tar":
        raise DataError(f"{file}: found an archive: expected a list, or `wds/{file.parent}` for a folder of archives")
    try:
        text = file.read_text(encoding="utf-8-sig")
        delimiter = None if file.suffix.lower() == ".json" else delimiter_of(text, file.suffix.lower())
        if delimiter is not None:
            images, classes = parse_table(text, delimiter)
        else:
            pairs = _from_json(text) if file.suffix.lower() == ".json" else _from_lines(text)
            images, classes = [Listed(path, (label,)) for path, label in pairs], None
    except UnicodeDecodeError as error:
        expected = f"a list saved as UTF-8, {', '.join(LIST_SUFFIXES)}"
        raise DataError(f"{file}: not UTF-8 ({error}): expected {expected}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file}: not a list of images that can be read ({error})") from error
    if not images:
        raise DataError(f"{file}: found an empty list: expected images and labels")
    return images, classes


def _check_repetitions(file: Path, images: Sequence[Listed], folder: str | Path) -> None:
    """Check that a list has each image once: of two, one might be trained on and the other tested."""
    known: dict[tuple[str | None, str], Listed] = {}
    for image in images:
        path = os.path.abspath(os.path.join(folder, image.path))
        first = known.setdefault((image.split, path), image)
        if first is not image:
            labels = " and as ".join(dict.fromkeys(", ".join(one.labels) or "nothing" for one in (first, image)))
            raise DataError(f"{file}: found {image.path} twice, as {labels}: expected each image once")


def _check_labels(file: Path, images: Sequence[Listed]) -> None:
    """Check that each image has a label, and that these are classes, not measurements."""
    without = [image.path for image in images if not image.labels]
    if without:
        raise DataError(f"{file}: found no label of {abbreviated(without)}: expected one for each image")
    labels = {label for image in images for label in image.labels}
    if all(re.fullmatch(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", label, re.IGNORECASE) for label in labels):
        measured = sorted(label for label in labels if not float(label).is_integer())
        if measured:
            reason = "predicting numbers (regression) is not supported"
            raise DataError(f"{file}: found the labels {abbreviated(measured)}: expected classes; {reason}")


def read_list(file: Path) -> Pairs:
    """Read the (path, label) of each image in a list file where each has one label; errors are those of ``read_lists``.

    The file holds ``path label`` lines; a table, as ``parse_table`` takes it; or JSON: an object path -> label, or an
    array of [path, label, ...], of which the first label counts.
    """
    _, images = read_lists({"train": file}).splits["train"]
    return [(image.path, image.labels[0]) for image in images]


def _from_lines(text: str) -> Pairs:
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            path, _, label = line.strip().rpartition(" ")  # the path may hold spaces
            if not path:
                raise ValueError(f"line {number} is {line.strip()!r}: expected `path label`")
            pairs.append((path.strip(), label))
    return pairs


def _from_json(text: str) -> Pairs:
    # as pairs: of a name that an object has twice, a dict would hold the last value alone
    content = json.loads(text, object_pairs_hook=list)
    for entry in content if isinstance(content, list) else [content]:
        is_pair = isinstance(entry, list | tuple) and len(entry) >= 2
        if not (is_pair and isinstance(entry[0], str) and isinstance(entry[1], int | float | str)):
            raise ValueError(f"found {str(entry)[:60]}: expected an object path -> label, or an array of [path, label]")
    return [(entry[0], str(entry[1])) for entry in content]


def sorted_labels(labels: Iterable[str]) -> list[str]:
    """The distinct labels, sorted by value if all are numbers, else as text."""
    distinct = set(labels)
    numbers = all(label.isdecimal() for label in distinct)
    return sorted(distinct, key=lambda label: (int(label), label) if numbers else label)  # 1 and 01 are two


def class_indices(labels: Sequence[str], classes: Sequence[str], where: object) -> list[int]:
    """The class index of each label.

    Args:
        where: what messages name as the place of the labels, such as a file or a split.

    Raises:
        DataError: naming the labels that are none of the classes.
    """
    index = {label: i for i, label in enumerate(classes)}
    if len(index) < len(classes):
        repeated = [name for name, count in Counter(classes).items() if count > 1]
        raise DataError(
            f"{where}: the known classes have {abbreviated(repeated)} more than once: expected a name for each"
        )
    unknown = sorted_labels(set(labels) - set(index))
    if unknown:
        known = f"the {len(index)} classes of train: {abbreviated(classes)}"
        raise DataError(f"{where}: found the class {abbreviated(unknown)}: expected some of {known}")
    return [index[label] for label in labels]


def find_lists(source: Path) -> dict[str, Path]:
    """Find the list file of each split, given one of them or their folder.

    Beside ``a/train_1.txt`` these are ``a/val_1.txt`` (or ``valid_1``, ``validation_1``) and ``a/test_1.txt``; in a
    folder ``train``, ``val`` and ``test`` with any suffix of a list; all in any case. A list whose name says no train
    stands alone: as test if a word of its name says so, as val likewise, else as train.

    Raises:
        DataError: if two files are the same split.
    """
    split, around = _named_split(source.stem)
    if source.is_dir():
        files, around = [file for file in source.iterdir() if file.suffix.lower() in LIST_SUFFIXES], ("", "")
    elif split == "train":
        files = [file for file in source.parent.iterdir() if file.suffix.lower() == source.suffix.lower()]
    else:
        return {split or "train": source}
    pattern = re.compile(f"{re.escape(around[0])}([a-z]+){re.escape(around[1])}", re.IGNORECASE)
    found: dict[str, Path] = {} if source.is_dir() else {"train": source}
    for file in sorted(files):
        match = pattern.fullmatch(file.stem)
        split = split_of(match[1]) if match else None
        if split is None or (split == "train" and source.is_file()) or not file.is_file():
            continue
        if split in found:
            raise DataError(f"{source}: found {found[split].name} and {file.name}: expected one list for {split}")
        found[split] = file
    return {split: found[split] for split in SPLITS if split in found}


def _named_split(stem: str) -> tuple[str | None, tuple[str, str]]:
    """The split that the name of a list says, and what is around it: a word for train, for another, or part of one."""
    words = [word for word in re.finditer("[a-z]+", stem, re.IGNORECASE) if split_of(word[0])]
    words.sort(key=lambda word: split_of(word[0]) != "train")
    words += re.finditer("training|train", stem, re.IGNORECASE)
    if not words:
        return None, ("", "")
    return split_of(words[0][0]), (stem[: words[0].start()], stem[words[0].end() :])


def abbreviated(names: Sequence[str]) -> str:
    """The first six names, and how many more there are."""
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def escaped(name: str) -> str:
    r"""A name as UTF-8 can hold it: bytes of file names that are none, in Python surrogates, are shown as \udc.."""
    return name.encode(errors="backslashreplace").decode()
