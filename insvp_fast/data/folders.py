"""Folders of images as people have them: what operating systems and tools leave in them is no class and no image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from insvp_fast.data.lists import some
from insvp_fast.errors import DataError

__all__ = ["SUFFIXES", "is_hidden", "listing", "picture_files", "read_classes"]

SUFFIXES = (*IMG_EXTENSIONS, ".apng", ".avif", ".gif", ".jfif", ".jp2")  # torchvision's, and what Pillow reads besides
LEFTOVERS = {
    "__macosx",
    "$recycle.bin",
    "@eadir",
    "desktop.ini",
    "lost+found",
    "system volume information",
    "thumbs.db",
}


def is_hidden(name: str) -> bool:
    """Whether a file or folder is passed over: its name starts with a dot, or an operating system made it."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def picture_files(folder: str | Path) -> list[str]:
    """The paths of all images in a folder and the folders in it, told by their endings, in ``ImageFolder``'s order.

    Links to folders are followed, each folder is entered once.

    Raises:
        DataError: if a folder cannot be listed.
    """
    found = [(place, name) for place, names in _walk(folder) for name in names if name.lower().endswith(SUFFIXES)]
    return [os.path.join(place, name) for place, name in sorted(found)]


def _walk(folder: str | Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, its files) of a folder and all below it, without what is hidden."""
    entered = set()
    for place, folders, files in os.walk(folder, onerror=_unlistable, followlinks=True):
        real = os.path.realpath(place)
        if real in entered:  # a link that leads back to where the walk has been
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield place, [name for name in files if not is_hidden(name)]


def _unlistable(error: OSError) -> None:
    raise DataError(f"{error.filename}: a folder that cannot be listed ({error.strerror})") from error


def read_classes(folder: Path) -> dict[str, list[str]]:
    """The images of each class folder; the classes sorted as text, the order of torchvision's ``ImageFolder``.

    Raises:
        DataError: if there is no class folder, or one without images.
    """
    _, folders, _ = next(os.walk(folder, onerror=_unlistable))
    names = sorted(name for name in folders if not is_hidden(name))
    if not names:
        raise DataError(f"--data {folder}: found {listing(folder)}, expected one folder of images per class")
    found = {name: picture_files(folder / name) for name in names}
    empty = [name for name, files in found.items() if not files]
    if empty:
        expected = f"expected a file that ends in {', '.join(sorted(SUFFIXES))}, or no such folder"
        raise DataError(f"--data {folder}: the class folder {some(empty)} is empty of images, {expected}")
    return found


def listing(folder: Path) -> str:
    """The names in a folder, for a message."""
    if not folder.is_dir():
        return "no such folder"
    return some(sorted(entry.name for entry in folder.iterdir() if not is_hidden(entry.name))) or "nothing"
