"""Loading the data of a run: what it trains on, validates on and tests on, from any source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset

from insvp_fast.data.cache import cache_images
from insvp_fast.data.images import Images
from insvp_fast.data.lists import class_indices
from insvp_fast.data.sets import DIGITS, PROTOCOLS, SETS
from insvp_fast.data.sources import SETS_IN_WORDS, read_source, read_test_source
from insvp_fast.data.splits import describe, divide, stratified_split
from insvp_fast.data.transforms import EvalBatchTransform, TrainBatchTransform, transform_for
from insvp_fast.errors import DataError

__all__ = ["Data", "load_data", "load_test_data"]

# VTAB images are resized straight to the input size, without crops or flips
SQUASHED = {"crop_pct": 1.0, "crop_mode": "squash", "augmentation": "none"}


class Data(NamedTuple):
    """The data of a run.

    Items are (image [3, H, W], class index). With a cache the image is uint8 [3, h, w], and ``on_device`` holds the
    transforms that batches of them still need.
    """

    train: Dataset
    val: Dataset
    test: Dataset
    plain_train: Dataset  # train, transformed as for evaluation
    class_names: list[str]
    tested_on: str  # the split that ``test`` is: "val" where there is no "test"
    protocol: str = "paper"  # which splits these are, in words
    on_device: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None = None  # for training, evaluation
    train_and_val: Dataset | None = None  # both, transformed as for training
    preprocessing: dict[str, Any] | None = None  # the one in use: arguments of timm.data.create_transform
    augmentation: str = "timm"  # what training adds to it: "timm", "crop" or "none"


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
    """Read a data set and divide it into train, val and test.

    Args:
        source: ``digits``; a name from ``insvp_fast.data.sets``; a folder with train and val and/or test, each a folder
            of images per class or a list train.txt or .json; such a list itself; or ``hfds/``, ``wds/``, ``tfds/``.
        preprocessing: as ``transform_for`` takes it.
        seed: of the random division, where there is no official one.
        root: the folder of a named set, or of the images that a list names.
        protocol: ``paper``, or ``released`` for the splits of the authors' code.
        cache: a folder to keep decoded images in.
        exif_rotation: rotate and flip images as their EXIF orientation says.

    Raises:
        DataError: saying what is missing or wrong, and what was expected where.
    """
    _check_protocol(protocol, source)
    preprocessing = _adapted(preprocessing, source)
    if cache is not None and preprocessing.get("augmentation", "timm") == "timm":
        preprocessing = preprocessing | {"augmentation": "crop"}  # timm's needs more than a cached center
    splits, class_names = read_source(source, seed, root)
    for images in splits.values():
        images.exif_rotation = exif_rotation
    division, words = _division(source, splits, seed, protocol)
    view, on_device = _views(splits, preprocessing, cache, Path(source).resolve().name)

    train, val = view("train", True), view("val" if division is None else "train", False)
    plain_train = view("train", False)
    if "train_and_val" in splits:
        both = view("train_and_val", True)
    else:
        both = train if division is not None else ConcatDataset([train, view("val", True)])
    if division is not None:
        train, val = Subset(train, division[0]), Subset(val, division[1])
        plain_train = Subset(plain_train, division[0])
    tested_on = "test" if "test" in splits else "val"
    used = dict(preprocessing)
    augmentation = used.pop("augmentation", "timm")
    return Data(
        train,
        val,
        test=view(tested_on, False),
        plain_train=plain_train,
        class_names=class_names,
        tested_on=tested_on,
        protocol=words,
        on_device=on_device,
        train_and_val=both,
        preprocessing=used,
        augmentation=augmentation,
    )


def load_test_data(
    source: str,
    preprocessing: dict[str, Any],
    seed: int,
    class_names: Sequence[str],
    *,
    root: str | None = None,
    exif_rotation: bool = True,
) -> Dataset:
    """Load what a trained model is tested on: the test split of ``source``, or else val; the same for every protocol.

    Args:
        class_names: the classes of the model. The images' classes are matched by name: the data may have fewer, and
            number them otherwise.

    Raises:
        DataError: if there is no such split, or an image has another class.
    """
    splits, names = read_test_source(source, class_names, seed, root)
    images = splits["test" if "test" in splits else "val"]
    indices = class_indices([names[index] for index in images.classes], class_names, f"`data` is {source}")
    images = Images(images.items, indices, exif_rotation=exif_rotation)
    return images.with_transform(transform_for(_adapted(preprocessing, source)))


def _check_protocol(protocol: str, source: str) -> None:
    if protocol not in PROTOCOLS:
        raise DataError(f"`protocol` is {protocol}: expected one of {', '.join(PROTOCOLS)}")
    if protocol == "released" and source not in SETS:
        reason = f"the authors' code has no splits for {source}, only for {SETS_IN_WORDS}"
        raise DataError(f"`protocol` is released: {reason}")


def _adapted(preprocessing: dict[str, Any], source: str) -> dict[str, Any]:
    """The preprocessing with what a source prescribes: no crop for VTAB, no augmentation for the digits."""
    if source.startswith("vtab/"):
        return preprocessing | SQUASHED
    return preprocessing | {"augmentation": "none"} if source == DIGITS else preprocessing


def _division(
    source: str, splits: dict[str, Images], seed: int, protocol: str
) -> tuple[tuple[list[int], list[int]] | None, str]:
    """How the split train is divided into train and val, and the splits in words.

    The division is the indices of each, or None if val is a split of its own.
    """
    if source == DIGITS:
        return None, f"{protocol}: 70 % train, 10 % val, 20 % test of every class, seed {seed}"
    if source in SETS:
        rule = SETS[source].released if protocol == "released" else SETS[source].paper
        if "val" not in splits:
            return divide(rule, len(splits["train"]), seed), describe(protocol, rule, seed)
        if rule == "official":
            return None, describe(protocol, rule, seed)
        return None, f"{protocol}: the lists train.json, val.json and test.json"
    if "val" in splits:
        return None, f"{protocol}: the splits as they are"
    try:
        division = stratified_split(range(len(splits["train"])), splits["train"].classes, 0.1, seed)
    except ValueError as error:  # a class with one image
        raise DataError(f"`data` is {source}: found no val, and train cannot be split 90/10 ({error})") from error
    return division, f"{protocol}: train/val 90/10 of every class of train, seed {seed}"


def _views(
    splits: dict[str, Images], preprocessing: dict[str, Any], cache: str | None, name: str
) -> tuple[Callable[[str, bool], Dataset], tuple[EvalBatchTransform, EvalBatchTransform] | None]:
    """A function that gives a split as seen in training or in evaluation, and the value of ``Data.on_device``."""
    if cache is None:
        return lambda split, training: splits[split].with_transform(transform_for(preprocessing, training)), None
    stored = {split: cache_images(images, preprocessing, cache, f"{name}-{split}") for split, images in splits.items()}
    evaluation = EvalBatchTransform(preprocessing)
    training = TrainBatchTransform(preprocessing) if preprocessing["augmentation"] == "crop" else evaluation
    return lambda split, _: stored[split], (training, evaluation)
