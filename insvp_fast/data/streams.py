"""Data sets in the formats that timm reads: ``wds/`` tar files, and what ``timm.data.create_dataset`` opens."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageDataset, create_dataset

from insvp_fast.data.folders import SUFFIXES, is_hidden
from insvp_fast.data.lists import by_number, indices_of
from insvp_fast.data.pictures import to_rgb
from insvp_fast.data.readers import Images, Parts, Slice
from insvp_fast.errors import DataError

__all__ = ["PREFIXES", "read_stream"]

PREFIXES = ("hfds/", "hfids/", "tfds/", "wds/")
SPLITS = {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}  # a part's names, the usual one first


def read_stream(source: str, root: str | None) -> Parts:
    """The parts of ``wds/FOLDER``, or of ``hfds/NAME``, ``hfids/NAME``, ``tfds/NAME`` as timm reads it.

    Tar files are indexed once and read in any order. What timm gives only as a stream (hfids, tfds) is kept
    in memory, turned upright or not as the library decodes it.

    Raises:
        DataError: if there is no train, or neither validation nor test, or what reads the format is not installed.
    """
    folder = Path(root) if root else Path(source.removeprefix("wds/"))
    read = _read_tars(folder) if source.startswith("wds/") else _read_timm(source, root)
    if len(read.parts) < 2:
        raise DataError(f"--data {source}: found only train, expected validation and/or test as well")
    return read


def _read_timm(source: str, root: str | None) -> Parts:
    found = {part: dataset for part in SPLITS if (dataset := _open(source, root, part)) is not None}
    parts = {part: _images(dataset) for part, dataset in found.items()}
    named: dict[str, int] = getattr(found["train"].reader, "class_to_idx", {})
    names = sorted(named, key=lambda name: named[name]) or [str(i) for i in range(max(parts["train"].classes) + 1)]
    return Parts(parts, names)


def _open(source: str, root: str | None, part: str) -> Any:
    """timm's data set for a part, or None if it has no such part."""
    for split in SPLITS[part]:
        try:
            return create_dataset(source, root, split, input_img_mode=None)  # images as they are: `to_rgb` converts
        except ImportError as error:
            package = {"hfds": "datasets", "hfids": "datasets", "tfds": "tensorflow-datasets"}[source.split("/")[0]]
            raise DataError(f"--data {source} needs a package: pip install {package}") from error
        except Exception as error:  # each library has its own way to say that a split does not exist
            reason = error
    if part == "train":
        raise DataError(f"--data {source}: train cannot be opened ({reason})") from reason
    return None


def _images(dataset: Any) -> Images:
    if isinstance(dataset, ImageDataset):
        reader = dataset.reader
        return Images(_Files(reader), [int(label) for label in reader.iter_targets()])
    pairs = [(_pixels(image), int(label)) for image, label in dataset]
    return Images([pixels for pixels, _ in pairs], [label for _, label in pairs])


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] of what a library has decoded: TensorFlow's is RGB, the others' is whatever the file holds."""
    return image if isinstance(image, np.ndarray) else np.asarray(to_rgb(image))


class _Files(Sequence):
    """The open image files of a timm reader."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: Any) -> Any:
        return self.reader[index][0]


def _read_tars(folder: Path) -> Parts:
    tars = {part: _tars_of(folder, part) for part in SPLITS}
    if not tars["train"]:
        expected = "expected train*.tar, or an _info.json that lists the files of train"
        raise DataError(f"--data wds/{folder}: {expected}; likewise validation and/or test")
    samples = {part: [row for file in files for row in _members(file)] for part, files in tars.items() if files}
    names = by_number(label for _, label in samples["train"])
    parts = {
        part: Images(
            [item for item, _ in rows], indices_of([label for _, label in rows], names, f"wds/{folder}, {part}")
        )
        for part, rows in samples.items()
    }
    return Parts(parts, names)


def _tars_of(folder: Path, part: str) -> list[Path]:
    info = next((file for name in ("_info.json", "info.json") if (file := folder / name).is_file()), None)
    try:
        splits = (
            {name: facts["filenames"] for name, facts in json.loads(info.read_text())["splits"].items()} if info else {}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{info}: expected splits, each with its filenames ({error!r})") from error
    for split in SPLITS[part]:
        files = [folder / name for name in splits.get(split, ())] or sorted(folder.glob(f"{split}*.tar"))
        if files:
            return files
    return []


def _members(file: Path) -> list[tuple[Slice, str]]:
    """(image, label) of each sample: files of one name, an image and a .cls with the class index."""
    pictures: dict[str, Slice] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(file, "r:") as tar:  # uncompressed only: its members can be read where they are
            for member in tar:
                if not member.isfile() or any(map(is_hidden, member.name.removeprefix("./").split("/"))):
                    continue
                stem, _, suffix = member.name.rpartition("/")[2].partition(".")
                key = member.name.removesuffix(f"{stem}.{suffix}") + stem
                where = Slice(str(file), member.name, member.offset_data, member.size)
                if f".{suffix.lower()}" in SUFFIXES:
                    pictures[key] = where
                elif suffix == "cls":
                    labels[key] = str(int(where.read()))
    except (OSError, ValueError, tarfile.TarError) as error:
        raise DataError(f"{file}: not a tar file of images and .cls labels that can be read ({error})") from error
    lonely = sorted(pictures.keys() ^ labels.keys())
    if lonely or not pictures:
        found = f"{lonely[0]} lacks its image or its .cls label" if lonely else "found no image"
        raise DataError(f"{file}: {found}; expected NAME.jpg and NAME.cls for each sample")
    return [(pictures[key], labels[key]) for key in pictures]
