"""Data sets of images: ``Images`` decodes them when they are asked for, ``Splits`` holds one for each split."""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from insvp_fast.data.decode import read_image
from insvp_fast.data.lists import class_indices
from insvp_fast.errors import DataError

__all__ = ["Images", "Part", "Splits", "TarMember", "files_of", "images_of_classes", "names_sha256", "require_files"]


class Images(Dataset):
    """Images with a class each; an item is (image, class index), with the image transformed if there is a transform.

    Args:
        items: each a path, a ``TarMember``, an open file, or pixels, uint8 [h, w, 3].
        classes: a class index for each item; or, where an image may have several labels, float32 [N, classes] of 0
            and 1, of which an item gets its row.
        exif_rotation: rotate and flip images as their EXIF orientation says.
        max_pixels: as in ``read_image``, for images of unknown origin.

    Attributes:
        split: the stored split that they are, if known; "train" also of data that are not divided.
    """

    split: str | None = None

    def __init__(
        self,
        items: Sequence[Any] | np.ndarray,
        classes: Sequence[int] | Tensor,
        transform: Callable[[Image.Image], Any] | None = None,
        exif_rotation: bool = True,
        max_pixels: int | None = None,
    ) -> None:
        self.items, self.classes, self.transform = items, classes, transform
        self.exif_rotation, self.max_pixels = exif_rotation, max_pixels

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int | Tensor]:
        image = self.decode(index)
        return image if self.transform is None else self.transform(image), self.classes[index]

    def decode(self, index: int) -> Image.Image:
        """The untransformed image, RGB.

        Raises:
            DataError: naming the file, if it is missing or no image.
        """
        try:  # an item may be read from a tar or the files of a library
            item = self.items[index]
            file = io.BytesIO(item.read()) if isinstance(item, TarMember) else item
        except OSError as error:
            reason = " ".join(str(error).split())  # in one line, as all errors
            raise DataError(f"{self.name(index)}: cannot be read ({reason})") from error
        if isinstance(item, np.ndarray):
            return Image.fromarray(item)
        return read_image(file, _name(item, index), self.exif_rotation, self.max_pixels)

    def name(self, index: int) -> str:
        """What messages call an image; none is read for it."""
        return _name(self.items[index], index) if isinstance(self.items, list | tuple) else f"image {index}"

    def digest(self) -> str:
        """A SHA-256 of the classes and, where each image is a file, of the files' sizes and names without folders."""
        digest = hashlib.sha256(np.asarray(self.classes, dtype=np.float32).tobytes())
        for item in self.items if isinstance(self.items, list) else ():
            if isinstance(item, TarMember):
                digest.update(os.fsencode(f"/{Path(item.name).name}/{item.size}"))
            elif isinstance(item, str | Path):
                size = os.path.getsize(item) if os.path.exists(item) else None  # reading it says that it is missing
                digest.update(os.fsencode(f"/{Path(item).name}/{size}"))
        return digest.hexdigest()

    def with_transform(self, transform: Callable[[Image.Image], Any]) -> Images:
        """The same images with another transform."""
        images = copy.copy(self)
        images.transform = transform
        return images


def _name(item: Any, index: int) -> str:
    return str(item) if isinstance(item, str | Path | TarMember) else f"image {index}"


class Part(Subset):
    """Some of a data set's images, with their classes."""

    @property
    def classes(self) -> Sequence[int] | Tensor:
        """As those of ``Images``."""
        classes = self.dataset.classes  # type: ignore[attr-defined]
        return classes[self.indices] if isinstance(classes, Tensor) else [classes[index] for index in self.indices]

    def decode(self, index: int) -> Image.Image:
        """As ``Images`` does."""
        return self.dataset.decode(self.indices[index])  # type: ignore[attr-defined]

    def name(self, index: int) -> str:
        """As ``Images`` does."""
        return self.dataset.name(self.indices[index])  # type: ignore[attr-defined]


def files_of(images: Images | Part) -> set[str]:
    """The whole paths of the images that are files of their own, wherever links lead to."""
    whole, rows = (images.dataset, images.indices) if isinstance(images, Part) else (images, range(len(images)))
    items = [whole.items[row] for row in rows] if isinstance(whole.items, list) else []  # type: ignore[attr-defined]
    real = functools.cache(os.path.realpath)  # of folders, which have many images
    paths = {
        os.path.join(real(path.parent), path.name)
        for item in items
        if isinstance(item, str | Path) and (path := Path(item))
    }
    return {os.path.realpath(path) if os.path.islink(path) else path for path in paths}


def names_sha256(images: Images | Part) -> str:
    """A SHA-256 of the images' names without folders and of their classes, in their order.

    It says which images these are, whatever is in their files; of pixels in an array, only how many and the classes.
    """
    digest = hashlib.sha256(np.asarray(images.classes, dtype=np.float32).tobytes())
    for index in range(len(images)):
        digest.update(os.fsencode(f"/{os.path.basename(images.name(index))}"))
    return digest.hexdigest()


class TarMember(NamedTuple):
    """A file in an uncompressed tar, which can be read without the rest of it."""

    file: str
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The member's content."""
        with open(self.file, "rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"


class Splits(NamedTuple):
    """A data set as it is stored: the images of each split (train, val, test, train_and_val), and the class names."""

    splits: dict[str, Images]
    class_names: list[str]


def images_of_classes(files: Mapping[str, Sequence[str]], classes: Sequence[str], where: object) -> Images:
    """The images of class folders: ``files`` by class name, which need not hold every one of ``classes``.

    Raises:
        DataError: if a name is not one of the classes.
    """
    pairs = [(file, name) for name, paths in files.items() for file in paths]
    return Images([file for file, _ in pairs], class_indices([name for _, name in pairs], classes, where))


def require_files(items: Sequence[Any] | np.ndarray, what: str) -> None:
    """Check that the paths among ``items`` exist; each folder is listed once, and no file is opened.

    Args:
        what: what messages call the items.

    Raises:
        DataError: naming the first missing file and how many are missing, or if there are no items.
    """
    paths = [Path(item) for item in items if isinstance(item, str | Path)]
    names = {folder: _names_in(folder) for folder in {path.parent for path in paths}}
    missing = [path for path in paths if path.name not in names[path.parent]]
    if missing:
        raise DataError(f"{len(missing)} of {what} ({len(paths)}) are missing, the first is {missing[0]}")
    if not len(items):
        raise DataError(f"found none of {what}")


def _names_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
