"""Loading the data of a run: what it trains on, validates on and tests on, from any source."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset
from torchvision.transforms import Compose

from insvp_fast.data.cache import cache_images
from insvp_fast.data.images import Images, Part, files_of
from insvp_fast.data.lists import abbreviated, class_indices, escaped
from insvp_fast.data.sets import DIGITS, PROTOCOLS, SETS
from insvp_fast.data.sources import SETS_IN_WORDS, read_source, read_test_source, require_text, tested_split
from insvp_fast.data.splits import describe, divide, stratified_split, three_way_split
from insvp_fast.data.transforms import (
    Transform,
    describe_augmentation,
    repeatable_steps,
    require_arguments,
    steps_of,
    transform_for,
)
from insvp_fast.errors import DataError

__all__ = ["Data", "divide_source", "load_data", "load_test_data"]

# VTAB images are resized straight to the input size, without crops or flips
SQUASHED = {"crop_pct": 1.0, "crop_mode": "squash", "augmentation": "none"}

# by the name of what is trained, validated or tested on: the stored split, and which of its images, or all
Parts = dict[str, tuple[str, list[int] | None]]


class Data(NamedTuple):
    """The data of a run.

    Items are (image [3, H, W], class index), or with ``multi_label`` (image, float32 [classes] of 0 and 1).
    """

    train: Dataset
    val: Dataset
    test: Dataset
    class_names: list[str]
    plain_train: Dataset  # train, transformed as for evaluation
    augmentation: dict[str, Any]  # of training: its name, the probability of flips, and all steps in words
    protocol: str  # which splits these are, in words
    train_and_val: Dataset  # both, transformed as for training
    preprocessing: dict[str, Any]  # the one in use: arguments of timm.data.create_transform
    multi_label: bool  # whether an image may have several labels, or none
    origin: dict[str, Any]  # ready for JSON, what ``load_test_data`` needs to know the test images again


def load_data(
    source: str,
    preprocessing: dict[str, Any],
    seed: int,
    *,
    root: str | None = None,
    protocol: str = "paper",
    augmentation: str | None = None,
    hflip: float | None = None,
    cache: str | None = None,
    exif_rotation: bool = True,
) -> Data:
    """Read a data set and divide it into train, val and test.

    Args:
        source: ``digits``; a name from ``insvp_fast.data.sets``; a folder of images per class; a folder of such folders
            train, val and test, or of lists train.txt, .json, .csv or .tsv; a list itself; or ``hfds/``, ``wds/``,
            ``tfds/``. Where val or test is missing, train is divided.
        preprocessing: as ``transform_for`` takes it.
        seed: of the random division, where there is no official one.
        root: the folder of a named set, or of the images that a list names.
        protocol: ``paper``, or ``released`` for the splits of the authors' code.
        augmentation, hflip: as ``transform_for`` takes them; None for none where the source prescribes that (VTAB and
            the digits), else for those of ``preprocessing``.
        cache: a folder to keep decoded images in; items are the same to the bit.
        exif_rotation: rotate and flip images as their EXIF orientation says.

    Raises:
        DataError: saying what is missing or wrong, and what was expected where.
    """
    _check(source, protocol)
    preprocessing = _adapted(preprocessing, source, augmentation=augmentation, hflip=hflip)
    transforms = {training: transform_for(preprocessing, training) for training in (True, False)}
    splits, class_names = read_source(source, seed, root)
    for images in splits.values():
        images.exif_rotation = exif_rotation
    _require_classes(source, splits["train"], class_names)
    parts, words = _divide(source, splits, class_names, seed, protocol)
    words += _describe_overlap(splits)
    view = _views(splits, transforms, cache, Path(source).resolve().name)

    def part(name: str, training: bool) -> Dataset:
        stored, rows = parts[name]
        return view(stored, training) if rows is None else Part(view(stored, training), rows)

    train, val = part("train", True), part("val", False)
    both = part("train_and_val", True) if "train_and_val" in parts else ConcatDataset([train, part("val", True)])
    return Data(
        train,
        val,
        test=part("test", False),
        class_names=class_names,
        protocol=words,
        train_and_val=both,
        plain_train=part("train", False),
        preprocessing={name: value for name, value in preprocessing.items() if name not in ("augmentation", "hflip")},
        augmentation=describe_augmentation(preprocessing),
        multi_label=isinstance(splits["train"].classes, Tensor),
        origin=_origin(source, splits, seed, words),
    )


def load_test_data(
    source: str,
    preprocessing: dict[str, Any],
    seed: int | None,
    class_names: Sequence[str],
    *,
    root: str | None = None,
    exif_rotation: bool = True,
    undivided_sha256: str | None = None,
) -> Images | Part:
    """Load what a trained model is tested on: the test split of ``source``, or else val; the same for every protocol.

    Args:
        seed: with which the model's own data were divided: where they have neither split, their part for testing is
            loaded. None for other data, of which all images are loaded then.
        class_names: the classes of the model. The images' classes are matched by name: the data may have fewer, and
            number them otherwise.
        undivided_sha256: of the model's own data, if they have neither split; data of another digest are other data.

    Raises:
        DataError: if an image has another class, or the data cannot be read.
    """
    splits, names = read_test_source(source, class_names, seed or 0, root)
    split = tested_split(splits)
    images = splits[split]
    classes = images.classes
    if names != list(class_names):
        classes = class_indices([names[index] for index in classes], class_names, f"`data` is {source}")
    images = Images(images.items, classes, transform_for(_adapted(preprocessing, source)), exif_rotation)
    images.split = split
    if split != "train" or seed is None or undivided_sha256 not in (None, splits["train"].digest()):
        return images
    return Part(images, _in_three(source, splits["train"], names, seed)[2])


def divide_source(
    source: str, seed: int, *, root: str | None = None, protocol: str = "paper"
) -> dict[str, Images | Part]:
    """The images of train, val and test without a transform; arguments and errors are those of ``load_data``."""
    splits, class_names = read_source(source, seed, root)
    parts, _ = _divide(source, splits, class_names, seed, protocol)
    found: dict[str, Images | Part] = {}
    for name in ("train", "val", "test"):
        split, rows = parts[name]
        found[name] = splits[split] if rows is None else Part(splits[split], rows)
    return found


def _check(source: str, protocol: str) -> None:
    """Check what is asked for before anything is read."""
    require_text(source)
    if protocol not in PROTOCOLS:
        raise DataError(f"`protocol` is {protocol}: expected one of {', '.join(PROTOCOLS)}")
    if protocol == "released" and source not in SETS:
        reason = f"the authors' code has no splits for {source}, only for {SETS_IN_WORDS}"
        raise DataError(f"`protocol` is released: {reason}")


def _adapted(preprocessing: dict[str, Any], source: str, **asked: Any) -> dict[str, Any]:
    """The preprocessing with what a source prescribes, no crop for VTAB, no augmentation for the digits, and ``asked``.

    A value of None is not asked for.
    """
    require_arguments(preprocessing)
    prescribed = SQUASHED if source.startswith("vtab/") else {"augmentation": "none"} if source == DIGITS else {}
    return preprocessing | prescribed | {name: value for name, value in asked.items() if value is not None}


def _divide(
    source: str, splits: dict[str, Images], class_names: Sequence[str], seed: int, protocol: str
) -> tuple[Parts, str]:
    """How the stored splits are divided, and the splits in words."""
    parts: Parts = {split: (split, None) for split in splits}
    if source == DIGITS:
        return parts, f"{protocol}: 70 % train, 10 % val, 20 % test of every class, seed {seed}"
    if source in SETS:
        rule = SETS[source].released if protocol == "released" else SETS[source].paper
        if "val" not in splits:
            return parts | _in_two(*divide(rule, len(splits["train"]), seed)), describe(protocol, rule, seed)
        if rule == "official":
            return parts, describe(protocol, rule, seed)
        return parts, f"{protocol}: the lists train.json, val.json and test.json"
    if splits.keys() >= {"val", "test"}:
        return parts, f"{protocol}: the splits as they are"
    of_what = "of train at random" if isinstance(splits["train"].classes, Tensor) else "of every class of train"
    if splits.keys() == {"train"}:
        train, val, test = _in_three(source, splits["train"], class_names, seed)
        parts = _in_two(train, val) | {"test": ("train", test), "train_and_val": ("train", sorted(train + val))}
        return parts, f"{protocol}: no val and no test were found, so these are 70/10/20 {of_what}, seed {seed}"
    _require(2, source, splits["train"], class_names)
    train, val = stratified_split(range(len(splits["train"])), splits["train"].classes, 0.1, seed)
    words = f"train/val 90/10 {of_what}, seed {seed}"
    if "val" in splits:  # a test set must not select the epoch, and what the data call val is often used to compare
        parts["test"] = parts["val"]
        words = f"no test was found, so val is only tested on; {words}"
    return parts | _in_two(train, val), f"{protocol}: {words}"


def _describe_overlap(splits: dict[str, Images]) -> str:
    """How many files of a split are in another as well, in words; nothing where there are none."""
    files = {split: files_of(splits[split]) for split in ("train", "val", "test") if split in splits}
    counts = [(one, other, len(files[one] & files[other])) for one, other in itertools.combinations(files, 2)]
    found = [f"{count} of the {len(files[b])} images of {b} are in {a} as well" for a, b, count in counts if count]
    return "".join(f"; {words}" for words in found)


def _origin(source: str, splits: dict[str, Images], seed: int, words: str) -> dict[str, Any]:
    return {
        "data": Path(source).resolve().name if Path(source).exists() else source,
        "split_seed": seed,
        "splits": words,
        "undivided_sha256": splits["train"].digest() if splits.keys() == {"train"} else None,
    }


def _in_two(train: list[int], val: list[int]) -> Parts:
    return {"train": ("train", train), "val": ("train", val), "train_and_val": ("train", None)}


def _in_three(
    source: str, images: Images, class_names: Sequence[str], seed: int
) -> tuple[list[int], list[int], list[int]]:
    _require(3, source, images, class_names)
    return three_way_split(images.classes, seed)


def _require_classes(source: str, images: Images, class_names: Sequence[str]) -> None:
    """Check that there are two or more classes where each image has one: the softmax of one is always 1."""
    if len(class_names) < 2 and not isinstance(images.classes, Tensor):
        found = ", ".join(map(escaped, class_names)) or "none"
        raise DataError(f"`data` is {source}: its classes are {found}: expected two or more")


def _require(count: int, source: str, images: Images, class_names: Sequence[str]) -> None:
    """Check that there are enough images to be divided, of every class where each has one."""
    if isinstance(images.classes, Tensor):  # divided at random
        problem = f"it has {len(images)} images: expected at least {count}" if len(images) < count else None
    else:
        found = Counter(images.classes)
        few = [class_names[index] for index in sorted(found) if found[index] < count]
        problem = f"the class {abbreviated(few)} has fewer than {count} images" if few else None
    if problem:
        raise DataError(f"`data` is {source}: found no val or no test, and train cannot be divided: {problem}")


def _views(
    splits: dict[str, Images], transforms: dict[bool, Transform], cache: str | None, name: str
) -> Callable[[str, bool], Dataset]:
    """A function that gives a split as seen in training (True) or in evaluation (False).

    With a cache, the steps before the first random one are done once and for all; in a split that is seen in both ways,
    those of them that both share.
    """
    if cache is None:
        return lambda split, training: splits[split].with_transform(transforms[training])
    done, stored = {}, {}
    for split, images in splits.items():
        done[split] = repeatable_steps(*([transforms[False]] if split == "test" else transforms.values()))
        stored[split] = cache_images(images, done[split], cache, f"{name}-{split}")

    def view(split: str, training: bool) -> Dataset:
        return stored[split].with_transform(Compose(steps_of(transforms[training])[len(done[split]) :]))

    return view
