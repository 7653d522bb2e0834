"""Data sets in the formats that timm reads: ``wds/`` tar files, and those that ``timm.data.create_dataset`` opens."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_dataset

from insvp_fast.data.decode import to_rgb
from insvp_fast.data.folders import SUFFIXES, is_ignored
from insvp_fast.data.images import Images, Splits, TarMember
from insvp_fast.data.lists import class_indices, sorted_labels
from insvp_fast.errors import DataError

__all__ = ["read_timm_format"]

NAMES = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}  # of each split, in the order tried


def read_timm_format(source: str, root: str | None) -> Splits:
    """Read ``wds/FOLDER``, or ``hfds/NAME``, ``hfids/NAME`` or ``tfds/NAME`` through timm.

    Tar files are indexed once, and their images read in any order. What timm gives only as a stream (hfids, tfds) is
    kept in memory, and EXIF orientation is applied or not as the library decodes it.

    Raises:
        DataError: if there is no train, or neither validation nor test, or a package is missing.
    """
    folder = Path(root) if root else Path(source.removeprefix("wds/"))
    found = _read_tars(folder) if source.startswith("wds/") else _read_with_timm(source, root)
    if len(found.splits) < 2:
        raise DataError(f"`data` is {source}: found only train: expected validation and/or test as well")
    return found


def _read_with_timm(source: str, root: str | None) -> Splits:
    found = {split: dataset for split in NAMES if (dataset := _open(source, root, split)) is not None}
    splits = {split: _images(dataset) for split, dataset in found.items()}
    indices: dict[str, int] = getattr(found["train"].reader, "class_to_idx", {})
    classes = sorted(indices, key=indices.__getitem__) or [str(i) for i in range(max(splits["train"].classes) + 1)]
    return Splits(splits, classes)


def _open(source: str, root: str | None, split: str) -> Any:
    """timm's data set for a split, or None if there is no such split."""
    for name in NAMES[split]:
        try:
            return create_dataset(source, root, name, input_img_mode=None)  # unconverted: `to_rgb` does it
        except ImportError as error:
            package = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow-datasets"}[source.split("/")[0]]
            raise DataError(f"`data` is {source}, which needs a package: pip install {package}") from error
        except Exception as error:  # each library raises its own error where a split does not exist
            reason = error
    if split == "train":
        raise DataError(f"`data` is {source}: train cannot be opened ({reason})") from reason
    return None


def _images(dataset: Any) -> Images:
    if isinstance(dataset, ImageDataset):
        reader = dataset.reader
        return Images(_Files(reader), [int(label) for label in reader.iter_targets()])
    pairs = [(_pixels(image), int(label)) for image, label in dataset]
    return Images([pixels for pixels, _ in pairs], [label for _, label in pairs])


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] of a decoded image: an RGB array from TensorFlow, an image of any mode from other libraries."""
    return image if isinstance(image, np.ndarray) else np.asarray(to_rgb(image))


class _Files(Sequence):
    """The open image files of a timm reader."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: Any) -> Any:
        return self.reader[index][0]


def _read_tars(folder: Path) -> Splits:
    tars = {split: _tars_of(folder, split) for split in NAMES}
    if not tars["train"]:
        expected = "expected train*.tar, or an _info.json that lists the files of train"
        raise DataError(f"`data` is wds/{folder}: {expected}; likewise validation and/or test")
    samples = {split: [row for file in files for row in _members(file)] for split, files in tars.items() if files}
    classes = sorted_labels(label for _, label in samples["train"])
    splits = {}
    for split, rows in samples.items():
        indices = class_indices([label for _, label in rows], classes, f"wds/{folder}, {split}")
        splits[split] = Images([member for member, _ in rows], indices)
    return Splits(splits, classes)


def _tars_of(folder: Path, split: str) -> list[Path]:
    listed = _tars_in_index(folder)
    for name in NAMES[split]:
        files = [folder / file for file in listed.get(name, ())] or sorted(folder.glob(f"{name}*.tar"))
        if files:
            return files
    return []


def _tars_in_index(folder: Path) -> dict[str, list[str]]:
    """The tar files of each split by ``_info.json``, if there is one."""
    file = next((file for name in ("_info.json", "info.json") if (file := folder / name).is_file()), None)
    if file is None:
        return {}
    try:
        return {name: split["filenames"] for name, split in json.loads(file.read_text())["splits"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file}: expected splits, each with its filenames ({error!r})") from error


def _members(file: Path) -> list[tuple[TarMember, str]]:
    """(image, label) of each sample: two files of one name, the image and a .cls with the class index."""
    images: dict[str, TarMember] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as tar:  # uncompressed only: members are read by their offset later
            for info in tar:
                if not info.isfile() or any(map(is_ignored, info.name.removeprefix("./").split("/"))):
                    continue
                stem, _, suffix = info.name.rpartition("/")[2].partition(".")
                key = info.name.removesuffix(f"{stem}.{suffix}") + stem
                member = TarMember(str(file), info.name, info.offset_data, info.size)
                if f".{suffix.lower()}" in SUFFIXES:
                    images[key] = member
                elif suffix == "cls":
                    labels[key] = str(int(member.read()))
    except (OSError, ValueError, tarfile.TarError) as error:
        raise DataError(f"{file}: not a tar file of images and .cls labels that can be read ({error})") from error
    unpaired = sorted(images.keys() ^ labels.keys())
    if unpaired or not images:
        found = f"{unpaired[0]} lacks its image or its .cls label" if unpaired else "found no image"
        raise DataError(f"{file}: {found}; expected NAME.jpg and NAME.cls for each sample")
    return [(images[key], labels[key]) for key in images]
