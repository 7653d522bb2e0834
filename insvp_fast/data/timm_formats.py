"""Data sets in formats that timm reads too: ``wds/`` tar files, Hugging Face datasets and TensorFlow Datasets."""

from __future__ import annotations

import functools
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from timm.data import create_dataset

from insvp_fast.data.decode import SUFFIXES
from insvp_fast.data.folders import is_ignored
from insvp_fast.data.images import Images, Splits, TarMember
from insvp_fast.data.lists import abbreviated, class_indices, sorted_labels
from insvp_fast.data.sets import SPLIT_NAMES, SPLITS
from insvp_fast.data.tfds import read_tfds
from insvp_fast.errors import DataError

__all__ = ["read_timm_format"]

CLASS_NAMES = ("classnames.txt", "class_names.txt", "classes.txt")  # files of names in the order of class indices


def read_timm_format(source: str, root: str | None) -> Splits:
    """Read ``wds/FOLDER``, ``tfds/NAME``, or ``hfds/NAME`` through timm; each image is read when it is asked for.

    ``hfids/NAME`` is the same as ``hfds/NAME``: training needs the images in any order, which a stream does not have.

    Raises:
        DataError: if there is no train, a package is missing, or a split has a class that train does not have.
    """
    kind, _, name = source.partition("/")
    images: Mapping[str, Sequence[Any]]
    if kind == "wds":
        return _read_tars(Path(root or name))
    if kind == "tfds":
        images, names = read_tfds(source, root)
        labels = {split: found.labels() for split, found in images.items()}
    else:
        images, labels, names = _read_hugging_face(source, root)
    for split, found in labels.items():
        _check_labels(found, f"`data` is {source}: {split}")
    texts = {split: [_name(names, label) for label in found] for split, found in labels.items()}
    if "train" not in texts:
        raise DataError(f"`data` is {source}: found {', '.join(texts) or 'no split'}: expected train as well")
    classes = names or sorted_labels(texts["train"])
    indices = {split: class_indices(found, classes, f"{source}, {split}") for split, found in texts.items()}
    return Splits({split: Images(images[split], indices[split]) for split in images}, classes)


def _read_hugging_face(
    source: str, root: str | None
) -> tuple[Mapping[str, Sequence[Any]], dict[str, list[Any]], list[str]]:
    """The images and labels of each split, and the names of the classes, empty if they have none."""
    readers = {split: reader for split in SPLITS if (reader := _open(source, root, split)) is not None}
    for split, reader in readers.items():
        _check_columns(reader.dataset.data, f"`data` is {source}: {split}", split == "train")
    images = {split: _Files(reader) for split, reader in readers.items()}
    labels = {split: list(reader.iter_targets()) for split, reader in readers.items()}
    indices: dict[str, int] = readers["train"].class_to_idx
    return images, labels, sorted(indices, key=indices.__getitem__)


def _open(source: str, root: str | None, split: str) -> Any:
    """timm's reader of a split, or None if there is no such split."""
    for name in SPLIT_NAMES[split]:
        try:
            return create_dataset(f"hfds/{source.partition('/')[2]}", root, name).reader
        except ImportError as error:
            raise DataError(f"`data` is {source}, which needs a package: pip install datasets") from error
        except ValueError as error:  # the library's for a split that does not exist
            reason = error
        except Exception as error:  # out of reach, say; without this split, another would be divided instead
            raise DataError(f"`data` is {source}: {split} cannot be opened ({error})") from error
    if split == "train":
        raise DataError(f"`data` is {source}: train cannot be opened ({reason})") from reason
    return None


def _check_columns(table: Any, where: str, is_train: bool) -> None:
    """Raise DataError without a label or images; where there is no column of images, timm has added one of nulls.

    All splits have the columns of train, so another one without any image has a column of them.
    """
    import pyarrow.compute as pc

    rows, lengths = table.num_rows, [pc.binary_length(field) for field in table.column("image").flatten()]
    given = [pc.fill_null(pc.greater(length, 0), False) for length in lengths]  # timm takes the bytes, or else the path
    images = pc.sum(functools.reduce(pc.or_, given)).as_py() or 0
    columns = [name for name in table.column_names if name != "image" or images or not (rows and is_train)]
    if not {"image", "label"} <= {*columns}:
        expected = "expected image and label; `rename_column` of datasets renames others"
        raise DataError(f"{where} has the columns {abbreviated(columns)}: {expected}")
    if images < rows:
        raise DataError(f"{where} has no image in {rows - images} of {rows} rows: expected one in each")


class _Files(Sequence):
    """The open image files of a timm reader."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: Any) -> Any:
        return self.reader[index][0]


def _check_labels(labels: Sequence[Any], where: str) -> None:
    """Raise DataError for a label that is no class: of measurements or lists each would become one of its own."""
    for label in labels:
        if not isinstance(label, int | np.integer | np.bool_ | str | bytes):
            raise DataError(f"{where}: found the label {str(label)[:60]}: expected a number of a class or its name")


def _name(classes: Sequence[str], label: Any) -> str:
    """A label as text: the name of a class index, if the classes have names."""
    return classes[int(label)] if isinstance(label, int | np.integer) and 0 <= label < len(classes) else str(label)


def _read_tars(folder: Path) -> Splits:
    tars = {split: _tars_of(folder, split) for split in SPLITS}
    if not tars["train"]:
        expected = "expected train*.tar, or an _info.json that lists the files of train"
        raise DataError(f"`data` is wds/{folder}: {expected}; likewise validation and/or test")
    names = _class_names(folder)
    samples = {split: [row for file in files for row in _members(file)] for split, files in tars.items() if files}
    classes = names or sorted_labels(label for _, label in samples["train"])
    splits = {}
    for split, rows in samples.items():
        labels = [_name(names, int(label)) if label.isdecimal() else label for _, label in rows]
        splits[split] = Images([member for member, _ in rows], class_indices(labels, classes, f"wds/{folder}, {split}"))
    return Splits(splits, classes)


def _class_names(folder: Path) -> list[str]:
    """The names of the class indices, one in each line of a file, if there is one."""
    file = next((file for name in CLASS_NAMES if (file := folder / name).is_file()), None)
    return [] if file is None else [name.strip() for name in file.read_text("utf-8-sig").splitlines() if name.strip()]


def _tars_of(folder: Path, split: str) -> list[Path]:
    listed = _tars_in_index(folder)
    for name in SPLIT_NAMES[split]:
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


def _label(content: bytes) -> str:
    """A class index without leading zeros, or a name."""
    label = content.decode().strip()
    if not label or "\n" in label:
        raise ValueError(f"a .cls file holds {label[:60]!r}: expected a class index or name")
    return str(int(label)) if label.isdecimal() else label


def _members(file: Path) -> list[tuple[TarMember, str]]:
    """(image, label) of each sample: two files of one name, the image and a .cls with its class."""
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
                    labels[key] = _label(member.read())
    except (OSError, ValueError, tarfile.TarError) as error:
        raise DataError(f"{file}: not a tar file of images and .cls labels that can be read ({error})") from error
    unpaired = sorted(images.keys() ^ labels.keys())
    if unpaired or not images:
        found = f"{unpaired[0]} lacks its image or its .cls label" if unpaired else "found no image"
        raise DataError(f"{file}: {found}; expected NAME.jpg and NAME.cls for each sample")
    return [(images[key], labels[key]) for key in images]
