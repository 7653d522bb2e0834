"""What is trained on, chosen by and tested on, from any source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from insvp_fast.data.cache import cached
from insvp_fast.data.folders import listing, read_classes
from insvp_fast.data.lists import Pairs, by_number, indices_of, read_list, siblings
from insvp_fast.data.readers import Images, Parts, by_folder, read_set, require_images
from insvp_fast.data.sets import DIGITS, HTA, PROTOCOLS, SETS, VTAB
from insvp_fast.data.splits import describe, divide
from insvp_fast.data.streams import PREFIXES, read_stream
from insvp_fast.data.transforms import Eval, Train, transform_for
from insvp_fast.errors import DataError

__all__ = ["Data", "load_data", "load_test_data", "read_source"]

# VTAB: straight to the size, no crop or flip
SQUASHED = {"crop_pct": 1.0, "crop_mode": "squash", "augmentation": "none"}


class Data(NamedTuple):
    """What is trained on, chosen by and tested on.

    Items are (image [3, H, W], class index); with a cache the image is uint8 [3, h, w], for ``on_device``.
    """

    train: Dataset
    val: Dataset
    test: Dataset
    class_names: list[str]
    tested_on: str  # the name of the test split: "val" where there is no "test"
    protocol: str = "paper"  # which splits these are, in words
    on_device: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None  # of train, of evaluation
    train_and_val: Dataset | None = None  # both, as train sees them
    preprocessing: dict[str, Any] | None = None  # the one in use: arguments of timm.data.create_transform
    augmentation: str = "timm"  # what training does besides: "timm", "crop" or "none"


def load_data(
    source: str,
    preprocessing: dict[str, Any],
    seed: int,
    *,
    root: str | None = None,
    protocol: str = "paper",
    cache: str | None = None,
    exif_rotation: bool = True,
) -> Data:
    """Read and divide a data set.

    Args:
        source: ``digits``; a name from ``insvp_fast.data.sets``; a folder with train and val and/or test, each a folder
            of images per class or a list train.txt or .json; such a list itself; or ``hfds/``, ``wds/``, ``tfds/``.
        preprocessing: for ``transform_for``.
        seed: of the split, where there is no official one.
        root: the folder of a named set, or of the images that a list names.
        protocol: ``paper``, or ``released`` for the splits of the authors' code.
        cache: a folder to keep decoded images in.
        exif_rotation: turn photographs upright, as their EXIF says.

    Raises:
        DataError: for all that the user can put right; says what was found, and what was expected where.
    """
    if protocol not in PROTOCOLS:
        raise DataError(f"--protocol is {protocol}: expected one of {', '.join(PROTOCOLS)}")
    if protocol == "released" and source not in SETS:
        raise DataError(
            f"--protocol is released: the authors' code has no splits for {source}, only for {_all_names()}"
        )
    preprocessing = _preprocessing_of(source, preprocessing)
    found = read_source(source, seed, root)
    parts = found.parts
    for images in parts.values():
        images.exif_rotation = exif_rotation
    division, words = _division(source, parts, seed, protocol)

    augmentation = preprocessing.get("augmentation", "timm")
    on_device = None
    if cache is not None:
        augmentation = "crop" if augmentation == "timm" else augmentation
        preprocessing = preprocessing | {"augmentation": augmentation}
        evaluation = Eval(preprocessing)
        on_device = (Train(preprocessing) if augmentation == "crop" else evaluation, evaluation)
        name = Path(source).resolve().name
        stored = {part: cached(images, preprocessing, cache, f"{name}-{part}") for part, images in parts.items()}

    def see(part: str, training: bool = False) -> Dataset:
        return parts[part].with_transform(transform_for(preprocessing, training)) if cache is None else stored[part]

    tested = "test" if "test" in parts else "val"
    train, both = see("train", True), see("train_and_val" if "train_and_val" in parts else "train", True)
    val = see("val" if division is None else "train")
    if division is not None:
        train, val = Subset(train, division[0]), Subset(val, division[1])
    elif "train_and_val" not in parts:
        both = ConcatDataset([both, see("val", True)])
    plain = {key: value for key, value in preprocessing.items() if key != "augmentation"}
    names = found.class_names
    return Data(train, val, see(tested), names, tested, words, on_device, both, plain, augmentation)


def load_test_data(
    source: str,
    preprocessing: dict[str, Any],
    seed: int,
    class_names: Sequence[str],
    *,
    root: str | None = None,
    exif_rotation: bool = True,
) -> Dataset:
    """What a trained model is tested on: the test part of ``source``, or else its val; the same in every protocol.

    Classes are found by their names: the data may have fewer than ``class_names``, and number them otherwise.

    Raises:
        DataError: if there is none, or an image has another class.
    """
    path = Path(source)
    if source not in (DIGITS, *SETS) and not source.startswith(PREFIXES):
        found = _read_tested(path, class_names, root)
    else:
        found = read_source(source, seed, root)
    images = found.parts["test" if "test" in found.parts else "val"]
    labels = [found.class_names[index] for index in images.classes]
    images = Images(images.items, indices_of(labels, class_names, f"--data {source}"), exif_rotation=exif_rotation)
    return images.with_transform(transform_for(_preprocessing_of(source, preprocessing)))


def read_source(source: str, seed: int = 0, root: str | None = None) -> Parts:
    """The parts of a data set as they are on disk, undivided; the arguments are those of ``load_data``."""
    if source == DIGITS:
        return _digits(seed)
    if source in SETS:
        if root is None:
            files = ", ".join(SETS[source].files)
            raise DataError(
                f"--data {source} needs --root FOLDER, which should hold {files}; from {SETS[source].origin}"
            )
        return read_set(source, root)
    if source.startswith(PREFIXES):
        return read_stream(source, root)
    path = Path(source)
    if not path.exists():
        names = ", ".join(VTAB) if source.startswith("vtab/") else f"{DIGITS}, {_all_names()}"
        raise DataError(f"--data {source}: no such folder or list; the names known are {names}")
    lists = siblings(path)
    return _listed(path, lists, root) if path.is_file() or "train" in lists else _image_folder(path)


def _preprocessing_of(source: str, preprocessing: dict[str, Any]) -> dict[str, Any]:
    if source.startswith("vtab/"):
        return preprocessing | SQUASHED
    return preprocessing | {"augmentation": "none"} if source == DIGITS else preprocessing


def _division(
    source: str, parts: dict[str, Images], seed: int, protocol: str
) -> tuple[tuple[list[int], list[int]] | None, str]:
    """The indices of train and val within the part train, None if val is a part of its own; and what that is called."""
    if source == DIGITS:
        return None, f"{protocol}: 70 % train, 10 % val, 20 % test of every class, seed {seed}"
    if source in SETS:
        rule = SETS[source].released if protocol == "released" else SETS[source].paper
        if "val" in parts:
            own = rule != "official"
            return None, f"{protocol}: the lists train.json, val.json and test.json" if own else describe(
                protocol, rule, seed
            )
        return divide(rule, len(parts["train"]), seed), describe(protocol, rule, seed)
    if "val" in parts:
        return None, f"{protocol}: the parts as they are"
    try:
        division = _split(range(len(parts["train"])), parts["train"].classes, 0.1, seed)
    except ValueError as error:  # a class with one image
        raise DataError(f"--data {source}: there is no val, and train cannot be split 90/10 ({error})") from error
    return division, f"{protocol}: train/val 90/10 of every class of train, seed {seed}"


def _split(indices: Sequence[int], classes: Any, part: float, seed: int) -> tuple[list[int], list[int]]:
    """Take ``part`` of the indices away, the same part of every class."""
    labels = np.asarray(classes)[list(indices)]
    return train_test_split(list(indices), test_size=part, stratify=labels, random_state=seed)


def _digits(seed: int) -> Parts:
    """1797 handwritten digits of 8x8 pixels, stratified: 70 % to train on, 10 % to validate, 20 % to test."""
    digits = load_digits()
    gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(gray[..., None], 3, axis=-1)
    rest, test = _split(range(len(pixels)), digits.target, 0.2, seed)
    train, val = _split(rest, digits.target, 0.125, seed)
    indices = {"train": train, "val": val, "test": test}
    parts = {part: Images(pixels[chosen], digits.target[chosen].tolist()) for part, chosen in indices.items()}
    return Parts(parts, [str(name) for name in digits.target_names])


def _image_folder(root: Path) -> Parts:
    names = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    if "train" not in names or len(names) < 2:
        raise DataError(f"--data {root}: found {listing(root)}, expected the folders train and val and/or test")
    folders = {name: read_classes(root / name) for name in names}
    classes = list(folders["train"])
    parts = {name: by_folder(found, classes, root / name) for name, found in folders.items()}
    return Parts(parts, classes)


def _listed(source: Path, lists: dict[str, Path], root: str | None) -> Parts:
    if "train" not in lists or len(lists) < 2:
        found = ", ".join(file.name for file in lists.values() if file.is_file()) or "nothing"
        raise DataError(f"--data {source}: found {found}, expected lists train and val and/or test, .txt or .json")
    pairs = {part: read_list(file) for part, file in lists.items()}
    labels = by_number(label for _, label in pairs["train"])
    folder = Path(root) if root is not None else lists["train"].parent
    return Parts({part: _from_list(rows, labels, folder, lists[part]) for part, rows in pairs.items()}, labels)


def _from_list(rows: Pairs, labels: Sequence[str], folder: Path, file: Path) -> Images:
    images = Images([folder / path for path, _ in rows], indices_of([label for _, label in rows], labels, file))
    require_images(images.items, f"the images that {file} names")
    return images


def _read_tested(source: Path, class_names: Sequence[str], root: str | None) -> Parts:
    """Only the part to be tested on, which need not lie beside a part train."""
    lists = siblings(source) if source.is_file() or source.is_dir() else {}
    file = lists.get("test", lists.get("val"))
    if file is not None:
        folder = Path(root) if root is not None else file.parent
        return Parts({"test": _from_list(read_list(file), class_names, folder, file)}, list(class_names))
    part = next((source / name for name in ("test", "val") if (source / name).is_dir()), None)
    if part is None:
        raise DataError(f"--data {source}: found {listing(source)}, expected a folder test or val")
    return Parts({"test": by_folder(read_classes(part), class_names, part)}, list(class_names))


def _all_names() -> str:
    return ", ".join(HTA) + " and the 19 tasks vtab/NAME"
