"""Reading a data set from any source: a named set, the digits, image folders, lists, or timm's formats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from insvp_fast.data.folders import listing, read_class_folders
from insvp_fast.data.images import Images, Splits, images_of_classes, require_files
from insvp_fast.data.lists import Pairs, class_indices, find_lists, read_list, sorted_labels
from insvp_fast.data.readers import read_set
from insvp_fast.data.sets import DIGITS, HTA, PREFIXES, SETS, SPLITS, VTAB
from insvp_fast.data.splits import stratified_split
from insvp_fast.data.timm_formats import read_timm_format
from insvp_fast.errors import DataError

__all__ = ["SETS_IN_WORDS", "read_source", "read_test_source"]

SETS_IN_WORDS = ", ".join(HTA) + " and the 19 tasks vtab/NAME"


def read_source(source: str, seed: int = 0, root: str | None = None) -> Splits:
    """Read the splits of a data set as they are stored; arguments and errors are those of ``load_data``."""
    if source == DIGITS:
        return _read_digits(seed)
    if source in SETS:
        if root is None:
            needed = f"{', '.join(SETS[source].files)}; from {SETS[source].origin}"
            raise DataError(f"`data` is {source}, which needs `root`, a folder that holds {needed}")
        return read_set(source, root)
    if source.startswith(PREFIXES):
        return read_timm_format(source, root)
    path = Path(source)
    if not path.exists():
        names = ", ".join(VTAB) if source.startswith("vtab/") else f"{DIGITS}, {SETS_IN_WORDS}"
        raise DataError(f"`data` is {source}: no such folder or list; the names known are {names}")
    lists = find_lists(path)
    return _read_lists(path, lists, root) if path.is_file() or "train" in lists else _read_image_folder(path)


def read_test_source(source: str, class_names: Sequence[str], seed: int = 0, root: str | None = None) -> Splits:
    """Read the splits of a data set for testing alone: of a folder or list, only test, or else val.

    Args:
        class_names: the classes of the training set, which number the images of a folder or list.

    Raises:
        DataError: if there is no such data set or split, it cannot be read, or an image has another class.
    """
    if source in (DIGITS, *SETS) or source.startswith(PREFIXES):
        return read_source(source, seed, root)
    path = Path(source)
    lists = find_lists(path) if path.is_file() or path.is_dir() else {}
    file = lists.get("test", lists.get("val"))
    if file is not None:
        images = _listed_images(file, read_list(file), class_names, root)
        return Splits({"test": images}, list(class_names))
    folder = next((path / split for split in ("test", "val") if (path / split).is_dir()), None)
    if folder is None:
        raise DataError(f"`data` is {source}: found {listing(path)}: expected a folder test or val")
    return Splits({"test": images_of_classes(read_class_folders(folder), class_names, folder)}, list(class_names))


def _read_digits(seed: int) -> Splits:
    """1797 handwritten digits of 8x8 pixels, stratified: 70 % train, 10 % val, 20 % test."""
    digits = load_digits()
    gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(gray[..., None], 3, axis=-1)
    rest, test = stratified_split(range(len(pixels)), digits.target, 0.2, seed)
    train, val = stratified_split(rest, digits.target, 0.125, seed)
    indices = {"train": train, "val": val, "test": test}
    splits = {split: Images(pixels[rows], digits.target[rows].tolist()) for split, rows in indices.items()}
    return Splits(splits, [str(name) for name in digits.target_names])


def _read_image_folder(root: Path) -> Splits:
    names = [split for split in SPLITS if (root / split).is_dir()]
    if "train" not in names or len(names) < 2:
        raise DataError(f"`data` is {root}: found {listing(root)}: expected the folders train and val and/or test")
    folders = {split: read_class_folders(root / split) for split in names}
    classes = list(folders["train"])
    splits = {split: images_of_classes(files, classes, root / split) for split, files in folders.items()}
    return Splits(splits, classes)


def _read_lists(source: Path, lists: dict[str, Path], root: str | None) -> Splits:
    if "train" not in lists or len(lists) < 2:
        found = ", ".join(file.name for file in lists.values() if file.is_file()) or "nothing"
        raise DataError(f"`data` is {source}: found {found}: expected lists train and val and/or test, .txt or .json")
    pairs = {split: read_list(file) for split, file in lists.items()}
    classes = sorted_labels(label for _, label in pairs["train"])
    splits = {split: _listed_images(lists[split], rows, classes, root) for split, rows in pairs.items()}
    return Splits(splits, classes)


def _listed_images(file: Path, pairs: Pairs, classes: Sequence[str], root: str | None) -> Images:
    """The images of a list file, whose paths are relative to ``root``, or else to the file's folder."""
    folder = Path(root) if root is not None else file.parent
    images = Images([folder / path for path, _ in pairs], class_indices([label for _, label in pairs], classes, file))
    require_files(images.items, f"the images that {file} names")
    return images
