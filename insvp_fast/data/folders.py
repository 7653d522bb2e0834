"""Folders of images, as found on disk: hidden files and leftovers of operating systems and tools are ignored."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from insvp_fast.data.decode import SUFFIXES
from insvp_fast.data.lists import abbreviated
from insvp_fast.data.sets import split_of
from insvp_fast.errors import DataError

__all__ = [
    "image_files",
    "is_ignored",
    "listing",
    "read_class_folders",
    "require_class_folders",
    "split_folders",
    "walk_images",
]

LEFTOVERS = {
    "__macosx",
    "$recycle.bin",
    "@eadir",
    "desktop.ini",
    "lost+found",
    "system volume information",
    "thumbs.db",
}


def is_ignored(name: str) -> bool:
    """Whether a file or folder of this name is ignored: it is hidden, or an operating system made it."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def image_files(folder: str | Path) -> list[str]:
    """The paths of all images in a folder and its subfolders, known by their suffix, in ``ImageFolder``'s order.

    Links to folders are followed, and each folder is entered once.

    Raises:
        DataError: if a folder cannot be listed.
    """
    return [os.path.join(parent, name) for parent, name in sorted(walk_images(folder))]


def walk_images(folder: str | Path) -> Iterator[tuple[str, str]]:
    """(folder, file name) of what ``image_files`` finds, as the file system lists it: no folder's names are held.

    Raises:
        DataError: if a folder cannot be listed.
    """
    entered, pending = set(), [str(folder)]
    while pending:
        parent = pending.pop()
        real = os.path.realpath(parent)
        if real in entered:  # a link to a folder that was already entered
            continue
        entered.add(real)
        folders = []
        try:
            with os.scandir(parent) as entries:
                for entry in entries:
                    if is_ignored(entry.name):
                        continue
                    if entry.is_dir():
                        folders.append(entry.path)
                    elif entry.name.lower().endswith(SUFFIXES):
                        yield parent, entry.name
        except OSError as error:
            _raise_unlistable(error)
        pending += sorted(
            folders, reverse=True
        )  # which of two links to a folder is entered must not depend on the disk


def _raise_unlistable(error: OSError) -> None:
    raise DataError(f"{error.filename}: a folder that cannot be listed ({error.strerror})") from error


def read_class_folders(folder: Path) -> dict[str, list[str]]:
    """The images of each class folder; the classes are sorted as text, like those of torchvision's ``ImageFolder``.

    Raises:
        DataError: if there is no class folder, or one without images.
    """
    names = _folders_in(folder)
    if not names:
        raise DataError(f"{folder}: found {listing(folder)}: expected one folder of images per class")
    found = {name: image_files(folder / name) for name in names}
    empty = [name for name, files in found.items() if not files]
    if empty:
        expected = f"expected a file that ends in {', '.join(sorted(SUFFIXES))}, or no such folder"
        raise DataError(f"{folder}: found no image in the class folder {abbreviated(empty)}: {expected}")
    return found


def split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split that ``root`` holds.

    Raises:
        DataError: if two folders are the same split.
    """
    found: dict[str, Path] = {}
    for name in _folders_in(root):
        split = split_of(name)
        if split in found:
            raise DataError(f"{root}: found {found[split].name} and {name}: expected one folder for {split}")
        if split is not None:
            found[split] = root / name
    return found


def require_class_folders(root: Path) -> None:
    """Check that the folders in ``root``, none of which is a split, can only be classes.

    Raises:
        DataError: if there are fewer than two, images lie beside them, or all hold folders of the same names.
    """
    names, expected = _folders_in(root), "expected train, val and test, or one folder of images per class"
    if len(names) < 2:
        raise DataError(f"{root}: found {listing(root)}: {expected}")
    loose = sorted(x.name for x in root.iterdir() if x.name.lower().endswith(SUFFIXES) and not x.is_dir())
    if loose:
        raise DataError(f"{root}: found {loose[0]} beside the folders {abbreviated(names)}: {expected}")
    inner = [_folders_in(root / name) for name in names]
    if inner[0] and all(below == inner[0] for below in inner):
        raise DataError(f"{root}: found {abbreviated(inner[0])} in each of {abbreviated(names)}: {expected}")


def _folders_in(folder: Path) -> list[str]:
    _, folders, _ = next(os.walk(folder, onerror=_raise_unlistable))
    return sorted(name for name in folders if not is_ignored(name))


def listing(folder: Path) -> str:
    """The names in a folder, for a message."""
    if not folder.is_dir():
        return "no such folder"
    return abbreviated(sorted(entry.name for entry in folder.iterdir() if not is_ignored(entry.name))) or "nothing"
