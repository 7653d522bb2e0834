"""Reading a data set from any source: a named set, the digits, image folders, lists, or timm's formats."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
import torch

from insvp_fast.data.folders import listing, read_class_folders, require_class_folders, split_folders
from insvp_fast.data.images import Images, Splits, images_of_classes, require_files
from insvp_fast.data.lists import class_indices, find_lists, read_lists, sorted_labels
from insvp_fast.data.readers import read_set
from insvp_fast.data.sets import DIGITS, HTA, PREFIXES, SETS, SPLITS, VTAB
from insvp_fast.data.splits import three_way_split
from insvp_fast.data.tables import Listed
from insvp_fast.data.timm_formats import read_timm_format
from insvp_fast.errors import DataError

__all__ = ["SETS_IN_WORDS", "read_source", "read_test_source", "require_text", "tested_split"]

SETS_IN_WORDS = ", ".join(HTA) + " and the 19 tasks vtab/NAME"


def read_source(source: str, seed: int = 0, root: str | None = None) -> Splits:
    """Read the splits of a data set as they are stored; arguments and errors are those of ``load_data``."""
    require_text(source)
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
    if not source or not path.exists():
        names = ", ".join(VTAB) if source.startswith("vtab/") else f"{DIGITS}, {SETS_IN_WORDS}"
        raise DataError(f"`data` is {source or repr(source)}: no such folder or list; the names known are {names}")
    lists, folders = _locate(path)
    if lists:
        return _read_lists(lists, root)
    if "train" not in folders:
        raise DataError(f"{path}: found {listing(path)}: expected a folder train as well")
    files = {split: read_class_folders(folder) for split, folder in folders.items()}
    classes = list(files["train"])
    return Splits({split: images_of_classes(files[split], classes, folders[split]) for split in files}, classes)


def read_test_source(source: str, class_names: Sequence[str], seed: int, root: str | None) -> Splits:
    """Read the splits of a data set for testing alone: of a folder or list, only test, or else val, or else train.

    Args:
        class_names: the classes of the training set, which number the images of a folder or list.

    Raises:
        DataError: if there is no such data set, it cannot be read, or an image has another class.
    """
    require_text(source)
    path = Path(source)
    if source in (DIGITS, *SETS, "") or source.startswith(PREFIXES) or not path.exists():
        return read_source(source, seed, root)
    lists, folders = _locate(path)
    if lists:
        return _read_lists(lists, root, class_names)
    split = tested_split(folders)
    images = images_of_classes(read_class_folders(folders[split]), class_names, folders[split])
    return Splits({split: images}, list(class_names))


def require_text(source: object) -> None:
    """Refuse a source that is no text, such as a path.

    Raises:
        DataError: naming it.
    """
    if not isinstance(source, str):
        raise DataError(f"`data` is {source!r}: expected text")


def _locate(path: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """The list file of each split, or else its folder of class folders; what is not divided is train."""
    lists, folders = find_lists(path), split_folders(path) if path.is_dir() else {}
    if "train" in lists or (lists and not folders):
        return lists, {}
    if not folders:
        require_class_folders(path)
    return {}, folders or {"train": path}


def tested_split(splits: Container[str]) -> str:
    """The split that a model is tested on."""
    return next(split for split in ("test", "val", "train") if split in splits)


def _read_digits(seed: int) -> Splits:
    """1797 handwritten digits of 8x8 pixels, stratified: 70 % train, 10 % val, 20 % test."""
    from sklearn.datasets import load_digits  # over a second

    digits = load_digits()
    gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(gray[..., None], 3, axis=-1)
    indices = zip(SPLITS, three_way_split(digits.target, seed), strict=True)
    splits = {split: Images(pixels[rows], digits.target[rows].tolist()) for split, rows in indices}
    return Splits(splits, [str(name) for name in digits.target_names])


def _read_lists(files: dict[str, Path], root: str | None, class_names: Sequence[str] | None = None) -> Splits:
    """Read lists; with the ``class_names`` of a model only what it is tested on."""
    lists = read_lists(files, root)
    splits, classes = lists.splits, class_names
    if classes is not None:
        splits = {split: splits[split] for split in (tested_split(splits),)}
    elif "train" in splits:
        classes = lists.classes or sorted_labels(label for image in splits["train"][1] for label in image.labels)
    else:
        raise DataError(f"{next(iter(files.values()))}: found {', '.join(splits)} alone: expected train as well")
    images = {
        split: _listed_images(f"{file} ({split})", listed, classes, Path(root or file.parent), lists.multi_label)
        for split, (file, listed) in splits.items()
    }
    return Splits(images, list(classes))


def _listed_images(
    where: str, listed: Sequence[Listed], classes: Sequence[str], folder: Path, multi_label: bool
) -> Images:
    """The images of a list, whose paths are relative to ``folder``."""
    targets: list[int] | torch.Tensor
    targets = indices = class_indices([label for image in listed for label in image.labels], classes, where)
    if multi_label:
        rows = [row for row, image in enumerate(listed) for _ in image.labels]
        targets = torch.zeros(len(listed), len(classes))
        targets[rows, indices] = 1
    images = Images([folder / image.path for image in listed], targets)
    require_files(images.items, f"the images that {where} names")
    return images
