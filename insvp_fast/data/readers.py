"""Readers of the named data sets: official files, read where they are; nothing is downloaded.

Each reader takes the folder and the set's name, and returns the official splits (train, test, and val if there is one)
with the names of the classes. ``read_set`` turns whatever goes wrong into one error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torchvision import datasets

from insvp_fast.data.folders import read_class_folders
from insvp_fast.data.images import Images, Splits, images_of_classes, require_files
from insvp_fast.data.lists import Pairs, class_indices, read_list, sorted_labels
from insvp_fast.data.pickles import read_pickle
from insvp_fast.data.sets import SETS, SPLITS, VTAB, NamedSet
from insvp_fast.errors import DataError

__all__ = ["read_set"]


def read_set(name: str, root: str | Path) -> Splits:
    """Read the official splits of a named set from ``root``, or from ``root/<name>``.

    Raises:
        DataError: naming the file that is missing or broken, where to get it and what the folder should hold.
    """
    known = SETS[name]
    home = _home(name, known, Path(root))
    try:
        found = (_read_vtab if name in VTAB else _READERS[name])(home, name)
        for split, images in found.splits.items():
            require_files(images.items, f"the images of {split}")
    except ModuleNotFoundError as error:
        message = f"{name} comes with .mat files, for which {error.name} is needed: pip install 'insvp-fast[data]'"
        raise DataError(message) from error
    except Exception as error:  # torchvision, scipy and pickle raise errors of many types for a truncated file
        reason = str(error) if isinstance(error, DataError | OSError) else f"{type(error).__name__}: {error}"
        raise DataError(_advice(name, known, home, f"incomplete or broken: {' '.join(reason.split())}")) from error
    return found


def _home(name: str, known: NamedSet, root: Path) -> Path:
    """The folder, ``root`` or one of the set's name in it, that holds all files that are needed."""
    homes = [root, root / name.split("/")[0]]
    alternatives = _needed(name, known)
    for home in homes:
        if any(all((home / file).exists() for file in files) for files in alternatives):
            return home
    home = max(homes, key=lambda home: sum((home / file).exists() for file in known.files))
    if not root.is_dir():
        raise DataError(_advice(name, known, root, "no such folder"))
    missing = next(file for file in known.files if not (home / file).exists())
    raise DataError(_advice(name, known, home, f"{missing} is missing"))


def _needed(name: str, known: NamedSet) -> list[tuple[str, ...]]:
    """The files, any of these groups, from which a set can be read: the official ones, or for some sets JSON lists."""
    images = known.files[-1]
    lists = tuple(str(Path(images).parent / f"{split}.json") for split in SPLITS)
    return [known.files, (*lists, images)] if name in _WITH_LISTS else [known.files]


def _advice(name: str, known: NamedSet, home: Path, problem: str) -> str:
    return f"{name} in {home}: {problem}. Get it from {known.origin}; the folder should hold {', '.join(known.files)}"


def _read_dtd(home: Path, name: str) -> Splits:
    found = {split: datasets.DTD(str(home), split, loader=Path) for split in SPLITS}
    return _from_torchvision(found, found["train"].classes)


def _read_flowers(home: Path, name: str) -> Splits:
    found = {split: _Flowers(str(home), split, loader=Path) for split in SPLITS}
    return _from_torchvision(found, datasets.Flowers102.classes)


def _read_food101(home: Path, name: str) -> Splits:
    found = {split: datasets.Food101(str(home), split, loader=Path) for split in ("train", "test")}
    return _from_torchvision(found, found["train"].classes)


def _read_gtsrb(home: Path, name: str) -> Splits:
    files = read_class_folders(home / "gtsrb/GTSRB/Training")
    classes, test = list(files), datasets.GTSRB(str(home), "test")._samples
    train = images_of_classes(files, classes, name)
    return Splits({"train": train, "test": Images([p for p, _ in test], [c for _, c in test])}, classes)


def _read_svhn(home: Path, name: str) -> Splits:
    found = {split: _SVHN(str(home), split) for split in ("train", "test")}
    splits = {split: Images(mat.data.transpose(0, 2, 3, 1), mat.labels.tolist()) for split, mat in found.items()}
    return Splits(splits, [str(digit) for digit in range(10)])


def _from_torchvision(found: dict[str, Any], names: list[str]) -> Splits:
    """From torchvision's data sets, whose loader ``Path`` gives each image as its path."""
    pairs = {split: [dataset[i] for i in range(len(dataset))] for split, dataset in found.items()}
    return Splits({split: Images([p for p, _ in rows], [c for _, c in rows]) for split, rows in pairs.items()}, names)


class _Flowers(datasets.Flowers102):
    """Without torchvision's MD5 check of the .mat files: damaged ones do not parse, and ``check`` compares counts."""

    _file_dict: ClassVar = {key: (file, None) for key, (file, _) in datasets.Flowers102._file_dict.items()}


class _SVHN(datasets.SVHN):
    """Without torchvision's MD5 check, too."""

    split_list: ClassVar = {key: [url, file, None] for key, (url, file, _) in datasets.SVHN.split_list.items()}


def _read_cifar10(home: Path, name: str) -> Splits:
    folder = home / "cifar-10-batches-py"
    train = [folder / f"data_batch_{i}" for i in range(1, 6)]
    return _cifar(train, folder / "test_batch", "labels", folder / "batches.meta", "label_names")


def _read_cifar100(home: Path, name: str) -> Splits:
    folder = home / "cifar-100-python"
    return _cifar([folder / "train"], folder / "test", "fine_labels", folder / "meta", "fine_label_names")


def _cifar(train: list[Path], test: Path, key: str, meta: Path, names: str) -> Splits:
    splits = {}
    for split, files in (("train", train), ("test", [test])):
        batches = [read_pickle(file) for file in files]
        pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        splits[split] = Images(pixels.transpose(0, 2, 3, 1), [label for batch in batches for label in batch[key]])
    return Splits(splits, read_pickle(meta)[names])


def _read_cub(home: Path, name: str) -> Splits:
    return _birds(home / "CUB_200_2011")


def _read_nabirds(home: Path, name: str) -> Splits:
    return _birds(home / "nabirds")


def _birds(folder: Path) -> Splits:
    names = _table(folder / "classes.txt") if (folder / "classes.txt").is_file() else {}
    lists = _json_lists(folder)
    if lists:
        return _from_pairs(lists, folder / "images", _names_by_folder(lists["train"], names))
    paths, labels, train = (
        _table(folder / f"{name}.txt") for name in ("images", "image_class_labels", "train_test_split")
    )
    if not paths.keys() == labels.keys() == train.keys():
        raise ValueError("images.txt, image_class_labels.txt and train_test_split.txt list different images")
    pairs: dict[str, Pairs] = {"train": [], "test": []}
    for image, path in paths.items():
        pairs["train" if train[image] == "1" else "test"].append((path, labels[image]))
    return _from_pairs(pairs, folder / "images", names)


def _names_by_folder(pairs: Pairs, names: dict[str, str]) -> dict[str, str]:
    """The name of each label by the class id that begins the folder of its images: lists may number the labels anew."""
    by_id = {_canonical(label): name for label, name in names.items()}
    ids = {label: re.match(r"\d*", Path(path).parent.name)[0] for path, label in pairs}  # type: ignore[index]
    return {label: by_id[id] for label, text in ids.items() if (id := _canonical(text)) in by_id}


def _read_dogs(home: Path, name: str) -> Splits:
    pairs = _json_lists(home) or {split: _dogs_list(home / f"{split}_list.mat") for split in ("train", "test")}
    breeds = {label: path.split("/")[0].partition("-")[2] for path, label in pairs["train"]}
    return _from_pairs(pairs, home / "Images", breeds)


def _dogs_list(file: Path) -> Pairs:
    from scipy.io import loadmat  # in the function: scipy is optional

    content = loadmat(file, squeeze_me=True)
    return [(str(p), str(c)) for p, c in zip(content["file_list"], content["labels"], strict=True)]


def _read_vtab(home: Path, name: str) -> Splits:
    folder, classes = home / name.removeprefix("vtab/"), SETS[name].classes
    files = {"train": "train800", "val": "val200", "train_and_val": "train800val200", "test": "test"}
    pairs = {split: read_list(folder / f"{file}.txt") for split, file in files.items()}
    # labels are class indices here, and 800 images need not cover all classes
    return _from_pairs(pairs, folder, {}, [str(i) for i in range(classes)])


def _json_lists(folder: Path) -> dict[str, Pairs]:
    """The lists train.json, val.json and test.json, as others publish their splits, if all three exist."""
    files = {split: folder / f"{split}.json" for split in SPLITS}
    return {split: read_list(file) for split, file in files.items()} if all(map(Path.is_file, files.values())) else {}


def _from_pairs(
    pairs: dict[str, Pairs], folder: Path, names: dict[str, str], labels: Sequence[str] | None = None
) -> Splits:
    """From (path, label) pairs; ``names`` are by label, and the labels of train are the classes unless given."""
    labels = labels or sorted_labels(_canonical(label) for _, label in pairs["train"])
    splits = {
        split: Images(
            [folder / path for path, _ in rows], class_indices([_canonical(c) for _, c in rows], labels, split)
        )
        for split, rows in pairs.items()
    }
    name_of = {_canonical(label): name for label, name in names.items()}
    found = [name_of.get(label, label) for label in labels]
    repeated = {name for name, count in Counter(found).items() if count > 1}  # as names, they would be one class
    return Splits(
        splits, [f"{name} ({label})" if name in repeated else name for name, label in zip(found, labels, strict=True)]
    )


def _canonical(label: str) -> str:
    """One spelling for each label: ``001`` and ``1`` are the same class."""
    return str(int(label)) if label.isdecimal() else label


def _table(file: Path) -> dict[str, str]:
    """Read ``key value`` lines; the value may hold spaces."""
    rows = (line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return {key: value.strip() for key, value in rows}


_READERS: dict[str, Callable[[Path, str], Splits]] = {
    "dtd": _read_dtd,
    "cub": _read_cub,
    "nabirds": _read_nabirds,
    "dogs": _read_dogs,
    "flowers": _read_flowers,
    "food101": _read_food101,
    "cifar100": _read_cifar100,
    "cifar10": _read_cifar10,
    "gtsrb": _read_gtsrb,
    "svhn": _read_svhn,
}
_WITH_LISTS = ("cub", "nabirds", "dogs")
