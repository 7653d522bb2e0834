"""Images and their classes: the digits of scikit-learn, or a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder

from insvp_fast.training.recipe import DIGITS, CommandError

__all__ = ["Data", "load_data", "load_test_data", "transform_for"]

Transform = Callable[[Image.Image], Tensor]


class Data(NamedTuple):
    """What is trained on, chosen by and tested on; each item is (image [3, H, W], class index)."""

    train: Dataset
    val: Dataset
    test: Dataset
    class_names: list[str]
    tested_on: str  # the name of the test split: "val" where a folder has no "test"


def transform_for(preprocessing: dict[str, Any], training: bool = False) -> Transform:
    """From a PIL image to a normalised tensor [3, H, W]; for training with timm's usual crops, flips and colours."""
    return create_transform(**preprocessing | {"input_size": tuple(preprocessing["input_size"])}, is_training=training)


def load_data(source: str, preprocessing: dict[str, Any], seed: int) -> Data:
    """The digits, or the image folder ``source``, split by ``seed`` where it is not split yet.

    Raises:
        CommandError: if the folder is not as expected; says what was found.
    """
    return _digits(preprocessing, seed) if source == DIGITS else _image_folder(Path(source), preprocessing, seed)


def load_test_data(source: str, preprocessing: dict[str, Any], seed: int, class_names: Sequence[str]) -> Dataset:
    """What a trained model is tested on: the test part of the digits, or a folder's test, or else its val.

    Raises:
        CommandError: if there is none, or it has other classes.
    """
    if source == DIGITS:
        found, data = [str(digit) for digit in range(10)], _digits(preprocessing, seed).test
    else:
        part = next((Path(source) / name for name in ("test", "val") if (Path(source) / name).is_dir()), None)
        if part is None:
            raise CommandError(f"--data {source}: found {_listing(Path(source))}, expected a folder test or val")
        data = _read_folder(part, transform_for(preprocessing))
        found = data.classes
    if list(found) != list(class_names):
        raise CommandError(f"--data {source}: found the classes {_some(found)}, expected {_some(class_names)}")
    return data


class Pictures(Dataset):
    """Images in memory."""

    def __init__(self, images: Sequence[Image.Image], classes: Sequence[int], transform: Transform) -> None:
        self.images, self.classes, self.transform = images, classes, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.classes[index]


def _digits(preprocessing: dict[str, Any], seed: int) -> Data:
    """1797 handwritten digits of 8x8 pixels, stratified: 70 % to train on, 10 % to validate, 20 % to test."""
    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = [Image.fromarray(picture).convert("RGB") for picture in grey]
    everything = Pictures(images, digits.target.tolist(), transform_for(preprocessing))
    rest, test = _split(range(len(images)), digits.target, 0.2, seed)
    train, val = _split(rest, digits.target, 0.125, seed)
    names = [str(name) for name in digits.target_names]
    return Data(Subset(everything, train), Subset(everything, val), Subset(everything, test), names, "test")


def _split(indices: Sequence[int], classes: Any, part: float, seed: int) -> tuple[list[int], list[int]]:
    """Take ``part`` of the indices away, the same part of every class."""
    labels = np.asarray(classes)[list(indices)]
    return train_test_split(list(indices), test_size=part, stratify=labels, random_state=seed)


def _image_folder(root: Path, preprocessing: dict[str, Any], seed: int) -> Data:
    parts = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if "train" not in parts or len(parts) < 2:
        raise CommandError(f"--data {root}: found {_listing(root)}, expected the folders train and val and/or test")
    plain = transform_for(preprocessing)
    train = _read_folder(parts["train"], transform_for(preprocessing, training=True))
    others = {name: _read_folder(folder, plain) for name, folder in parts.items() if name != "train"}
    for name, folder in others.items():
        if folder.classes != train.classes:
            raise CommandError(
                f"--data {root}: {name} has the classes {_some(folder.classes)}, train has {_some(train.classes)}"
            )
    test = "test" if "test" in others else "val"
    if "val" in others:
        return Data(train, others["val"], others[test], train.classes, test)
    try:
        kept, held_out = _split(range(len(train)), train.targets, 0.1, seed)
    except ValueError as error:  # a class with one image
        raise CommandError(f"--data {root}: there is no val, and train cannot be split 90/10 ({error})") from error
    val = Subset(_read_folder(parts["train"], plain), held_out)
    return Data(Subset(train, kept), val, others[test], train.classes, test)


def _read_folder(folder: Path, transform: Transform) -> ImageFolder:
    try:
        return ImageFolder(str(folder), transform)
    except FileNotFoundError as error:
        found = f"found {_listing(folder)}, expected one folder of images per class"
        raise CommandError(f"--data {folder}: {found}") from error


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return _some(sorted(entry.name for entry in folder.iterdir())) or "nothing"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
