"""Lists of image files of any length, in order, in bounded memory."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from insvp_fast.data.folders import walk_images
from insvp_fast.errors import DataError

__all__ = ["ImageList"]


class ImageList:
    """The files among paths, and the images in the folders among them, in the order of the paths.

    The images of a folder are those of ``image_files``, in its order. A temporary file of SQLite holds and sorts their
    names, in a few MiB of memory; only the folders are held besides. It takes about 100 bytes of disk for each image,
    in SQLITE_TMPDIR, TMPDIR or /var/tmp.

    Args:
        shard: (k, n) for the k-th of n parts, from 1 on; one after another they are the whole list.

    Raises:
        DataError: if a path does not exist, a folder holds no image or cannot be listed, or the disk is full.
    """

    def __init__(self, paths: Iterable[str | Path], shard: tuple[int, int] = (1, 1)) -> None:
        self.database = sqlite3.connect("")  # a file that SQLite deletes
        self.database.execute("CREATE TABLE images (position INTEGER, folder BLOB, name BLOB)")
        try:
            found = sum(self._add(position, Path(path)) for position, path in enumerate(paths))
        except sqlite3.Error as error:
            raise DataError(f"the images cannot be listed in a temporary file: {error}") from error
        part, parts = shard
        self.first, self.end = found * (part - 1) // parts, found * part // parts

    def __len__(self) -> int:
        return self.end - self.first

    def __iter__(self) -> Iterator[str]:
        rows = self.database.execute("SELECT folder, name FROM images ORDER BY position, folder, name")
        for folder, name in islice(rows, self.first, self.end):
            yield os.fsdecode(os.path.join(folder, name))

    def _add(self, position: int, path: Path) -> int:
        """The number of files that were added."""
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        names = walk_images(path) if path.is_dir() else [os.path.split(path)]
        rows = ((position, os.fsencode(folder), os.fsencode(name)) for folder, name in names)
        count = self.database.executemany("INSERT INTO images VALUES (?, ?, ?)", rows).rowcount
        if not count:
            raise DataError(f"{path}: no image in this folder")
        return count
