"""The named sets as they lie on disk: official files, read where they are; nothing is downloaded.

Each reader takes the folder and the set's name, and returns the official parts (train, test, and val if there is one)
with the names of the classes. What is missing or cannot be read becomes one error.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision import datasets

from insvp_fast.data.folders import read_classes
from insvp_fast.data.lists import PARTS, Pairs, by_number, indices_of, read_list
from insvp_fast.data.pictures import read_picture
from insvp_fast.data.sets import SETS, NamedSet
from insvp_fast.errors import DataError

__all__ = ["Images", "Parts", "Slice", "by_folder", "read_pickle", "read_set", "require_images"]


class Images(Dataset):
    """Images with a class each; an item is (image, class index), the image transformed if there is a transform.

    Args:
        items: each a path, a ``Slice`` of a file, an open file, or pixels, uint8 [h, w, 3].
        classes: an index each.
        exif_rotation: turn photographs upright, as their EXIF says.
    """

    def __init__(
        self,
        items: Sequence[Any] | np.ndarray,
        classes: Sequence[int],
        transform: Callable[[Image.Image], Any] | None = None,
        exif_rotation: bool = True,
    ) -> None:
        self.items, self.classes, self.transform, self.exif_rotation = items, classes, transform, exif_rotation

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.picture(index)
        return image if self.transform is None else self.transform(image), self.classes[index]

    def picture(self, index: int) -> Image.Image:
        """The image itself, RGB.

        Raises:
            DataError: naming the file, if it is missing or no image.
        """
        item = self.items[index]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item)
        return read_picture(item.open() if isinstance(item, Slice) else item, self.name(index), self.exif_rotation)

    def name(self, index: int) -> str:
        """What to call an image in a message."""
        item = self.items[index]
        return str(item) if isinstance(item, str | Path | Slice) else f"image {index}"

    def with_transform(self, transform: Callable[[Image.Image], Any]) -> Images:
        """The same images, seen differently."""
        return Images(self.items, self.classes, transform, self.exif_rotation)


def by_folder(found: Mapping[str, Sequence[str]], classes: Sequence[str], where: object) -> Images:
    """The images of class folders, numbered as ``classes`` are; not every one of these need have images.

    Raises:
        DataError: if a folder is none of the classes.
    """
    pairs = [(file, name) for name, files in found.items() for file in files]
    return Images([file for file, _ in pairs], indices_of([name for _, name in pairs], classes, where))


class Slice(NamedTuple):
    """A file inside a file: a member of an uncompressed tar."""

    file: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The member's content."""
        with open(self.file, "rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)

    def open(self) -> io.BytesIO:
        """The member as a file."""
        return io.BytesIO(self.read())

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"


class Parts(NamedTuple):
    """What a reader returns."""

    parts: dict[str, Images]
    class_names: list[str]


def read_set(name: str, root: str | Path) -> Parts:
    """The official parts of the named set in ``root``, or in ``root/<name>``.

    Raises:
        DataError: one, that says which file is missing or broken, where to get it and what the folder looks like.
    """
    known = SETS[name]
    home = _home(name, known, Path(root))
    try:
        found = _READERS.get(name, _read_vtab)(home, name)
        for part, images in found.parts.items():
            require_images(images.items, f"the images of {part}")
    except ModuleNotFoundError as error:
        message = f"{name} comes with .mat files, for which {error.name} is needed: pip install 'insvp-fast[data]'"
        raise DataError(message) from error
    except Exception as error:  # what torchvision, scipy and pickle raise for a file that is cut off is of every kind
        reason = str(error) if isinstance(error, DataError | OSError) else f"{type(error).__name__}: {error}"
        raise DataError(_advice(name, known, home, f"incomplete or broken: {' '.join(reason.split())}")) from error
    return found


def _home(name: str, known: NamedSet, root: Path) -> Path:
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
    """The files of the official set; for some sets lists in JSON serve as well."""
    images = known.files[-1]
    lists = tuple(str(Path(images).parent / f"{part}.json") for part in ("train", "val", "test"))
    return [known.files, (*lists, images)] if name in _WITH_LISTS else [known.files]


def _advice(name: str, known: NamedSet, home: Path, problem: str) -> str:
    return f"{name} in {home}: {problem}. Get it from {known.origin}; the folder should hold {', '.join(known.files)}"


def require_images(items: Sequence[Any] | np.ndarray, what: str) -> None:
    """Refuse a list that names files which are not there; each folder is listed once, no file is touched.

    Raises:
        DataError: with the first of them, and how many there are.
    """
    paths = [Path(item) for item in items if isinstance(item, str | Path)]
    listed = {folder: _names_in(folder) for folder in {path.parent for path in paths}}
    missing = [path for path in paths if path.name not in listed[path.parent]]
    if missing:
        raise DataError(f"{len(missing)} of {what} ({len(paths)}) are missing, the first is {missing[0]}")
    if not len(items):
        raise DataError(f"found none of {what}")


def _names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()


# ---------------------------------------------------------------------------------------------------- torchvision's


def _read_dtd(home: Path, name: str) -> Parts:
    found = {part: datasets.DTD(str(home), part, loader=Path) for part in ("train", "val", "test")}
    return _parts(found, found["train"].classes)


def _read_flowers(home: Path, name: str) -> Parts:
    found = {part: _Flowers(str(home), part, loader=Path) for part in ("train", "val", "test")}
    return _parts(found, datasets.Flowers102.classes)


def _read_food101(home: Path, name: str) -> Parts:
    found = {part: datasets.Food101(str(home), part, loader=Path) for part in ("train", "test")}
    return _parts(found, found["train"].classes)


def _read_gtsrb(home: Path, name: str) -> Parts:
    train, test = read_classes(home / "gtsrb/GTSRB/Training"), datasets.GTSRB(str(home), "test")._samples
    parts = {"train": by_folder(train, list(train), name), "test": Images([p for p, _ in test], [c for _, c in test])}
    return Parts(parts, list(train))


def _read_svhn(home: Path, name: str) -> Parts:
    found = {part: _SVHN(str(home), part) for part in ("train", "test")}
    parts = {part: Images(mat.data.transpose(0, 2, 3, 1), mat.labels.tolist()) for part, mat in found.items()}
    return Parts(parts, [str(digit) for digit in range(10)])


def _parts(found: dict[str, Any], names: list[str]) -> Parts:
    """The loader ``Path`` leaves each image as its path."""
    pairs = {part: [dataset[i] for i in range(len(dataset))] for part, dataset in found.items()}
    return Parts({part: Images([p for p, _ in pair], [c for _, c in pair]) for part, pair in pairs.items()}, names)


class _Flowers(datasets.Flowers102):
    """Without the MD5 sums of the .mat files: a damaged one does not parse, and ``check`` compares the counts."""

    _file_dict: ClassVar = {key: (file, None) for key, (file, _) in datasets.Flowers102._file_dict.items()}


class _SVHN(datasets.SVHN):
    """Without MD5 sums, likewise."""

    split_list: ClassVar = {key: [url, file, None] for key, (url, file, _) in datasets.SVHN.split_list.items()}


# ------------------------------------------------------------------------------------------------------ CIFAR's pickles


_reconstruct = np.empty(0).__reduce__()[0]  # its module has another name in numpy 1 and 2


class _PlainUnpickler(pickle.Unpickler):
    """Arrays and plain containers only: a file that asks for anything else could run code."""

    ALLOWED: ClassVar = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("_codecs", "encode"): str.encode,  # how Python 3 writes bytes in the old protocol
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"asks for {module}.{name}; only arrays and plain values are read")
        return self.ALLOWED[module, name]


def read_pickle(file: Path) -> Any:
    """A pickle of numpy arrays, dict, list, bytes, str and int.

    Raises:
        pickle.UnpicklingError: if there is anything else in it; nothing of it is run.
    """
    with file.open("rb") as stream:
        return _PlainUnpickler(stream, encoding="latin1").load()


def _read_cifar10(home: Path, name: str) -> Parts:
    folder = home / "cifar-10-batches-py"
    train = [folder / f"data_batch_{i}" for i in range(1, 6)]
    return _cifar(train, folder / "test_batch", "labels", folder / "batches.meta", "label_names")


def _read_cifar100(home: Path, name: str) -> Parts:
    folder = home / "cifar-100-python"
    return _cifar([folder / "train"], folder / "test", "fine_labels", folder / "meta", "fine_label_names")


def _cifar(train: list[Path], test: Path, key: str, meta: Path, names: str) -> Parts:
    parts = {}
    for part, files in (("train", train), ("test", [test])):
        batches = [read_pickle(file) for file in files]
        pixels = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
        parts[part] = Images(pixels.transpose(0, 2, 3, 1), [label for batch in batches for label in batch[key]])
    return Parts(parts, read_pickle(meta)[names])


# ------------------------------------------------------------------------------------------------- birds, dogs, VTAB


def _read_cub(home: Path, name: str) -> Parts:
    return _birds(home / "CUB_200_2011")


def _read_nabirds(home: Path, name: str) -> Parts:
    return _birds(home / "nabirds")


def _birds(folder: Path) -> Parts:
    names = _table(folder / "classes.txt") if (folder / "classes.txt").is_file() else {}
    lists = _json_lists(folder)
    if lists:
        return _from_pairs(lists, folder / "images", names)
    paths, labels, train = (
        _table(folder / f"{name}.txt") for name in ("images", "image_class_labels", "train_test_split")
    )
    if not paths.keys() == labels.keys() == train.keys():
        raise ValueError("images.txt, image_class_labels.txt and train_test_split.txt name different images")
    pairs: dict[str, Pairs] = {"train": [], "test": []}
    for image, path in paths.items():
        pairs["train" if train[image] == "1" else "test"].append((path, labels[image]))
    return _from_pairs(pairs, folder / "images", names)


def _read_dogs(home: Path, name: str) -> Parts:
    pairs = _json_lists(home) or {part: _dogs_list(home / f"{part}_list.mat") for part in ("train", "test")}
    breeds = {label: path.split("/")[0].partition("-")[2] for path, label in pairs["train"]}
    return _from_pairs(pairs, home / "Images", breeds)


def _dogs_list(file: Path) -> Pairs:
    from scipy.io import loadmat

    content = loadmat(file, squeeze_me=True)
    return [(str(p), str(c)) for p, c in zip(content["file_list"], content["labels"], strict=True)]


def _read_vtab(home: Path, name: str) -> Parts:
    folder, classes = home / name.removeprefix("vtab/"), SETS[name].classes
    files = {"train": "train800", "val": "val200", "train_and_val": "train800val200", "test": "test"}
    pairs = {part: read_list(folder / f"{file}.txt") for part, file in files.items()}
    # the labels are the indices; not every class need be among 800 images
    return _from_pairs(pairs, folder, {}, [str(i) for i in range(classes)])


def _json_lists(folder: Path) -> dict[str, Pairs]:
    """The lists train.json, val.json and test.json, if all are there: a split that others have made."""
    files = {part: folder / f"{part}.json" for part in PARTS}
    return {p: read_list(file) for p, file in files.items()} if all(map(Path.is_file, files.values())) else {}


def _from_pairs(
    pairs: dict[str, Pairs], folder: Path, names: dict[str, str], labels: Sequence[str] | None = None
) -> Parts:
    """Paths and labels to images and indices; the labels of train are the classes, unless they are given."""
    labels = labels or by_number(_plain(label) for _, label in pairs["train"])
    parts = {
        part: Images([folder / path for path, _ in rows], indices_of([_plain(c) for _, c in rows], labels, part))
        for part, rows in pairs.items()
    }
    plain_names = {_plain(label): name for label, name in names.items()}
    return Parts(parts, [plain_names.get(label, label) for label in labels])


def _plain(label: str) -> str:
    """``001`` and ``1`` are one class."""
    return str(int(label)) if label.isdecimal() else label


def _table(file: Path) -> dict[str, str]:
    """``key value`` lines; the value may hold spaces."""
    rows = (line.split(maxsplit=1) for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return {key: value.strip() for key, value in rows}


_READERS: dict[str, Callable[[Path, str], Parts]] = {
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
