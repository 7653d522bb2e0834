"""A cache of decoded images: a memory-mapped file of pixels that all processes share."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms import Compose

from insvp_fast.atomic_files import replace_file, write_file
from insvp_fast.data.images import Images, TarMember
from insvp_fast.errors import DataError

__all__ = ["CachedImages", "cache_images"]

FORMAT = 3  # raised whenever the file's format or the way images are read changes
CHUNK = 32  # images decoded before they are written
ABANDONED = 24 * 3600  # seconds: a process that lives writes all the time


class CachedImages(Images):
    """Images whose pixels come from a cache; an untransformed one is as the cache's steps left it.

    Args:
        images: the same images, not cached.
        file: the pixels, uint8 [h, w, 3], of one image after the other; a JSON file beside it holds the sizes.
    """

    def __init__(self, images: Images, file: Path) -> None:
        super().__init__(images.items, images.classes, None, images.exif_rotation, images.max_pixels)
        self.file = file
        self.sizes = np.array(json.loads(file.with_suffix(".json").read_text())["sizes"], np.int64).reshape(-1, 2)
        self.ends = (self.sizes.prod(1) * 3).cumsum()
        self._map()

    def decode(self, index: int) -> Image.Image:
        """The stored image, RGB."""
        (height, width), end = self.sizes[index], self.ends[index]
        return Image.fromarray(self.pixels[end - height * width * 3 : end].reshape(height, width, 3))

    def _map(self) -> None:
        self.pixels = np.memmap(self.file, np.uint8, "r") if len(self.sizes) else np.empty(0, np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"pixels": None}  # a data loader's worker maps the file itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()


def cache_images(images: Images, steps: Sequence[Any], folder: str | Path, name: str) -> CachedImages:
    """Images after some steps: decoded and written to ``folder`` the first time, read from it later.

    The file's name holds a hash of the images' paths, sizes and times, of the steps and of how images are read: if any
    of these changes, another file is written. Files appear under their name only when complete; of two processes that
    write the same one, the last wins.

    Args:
        steps: as from ``repeatable_steps``.

    Raises:
        DataError: if an image cannot be read, or the folder cannot be written to.
    """
    file = Path(folder) / f"{name}-{_hash(images, steps)}.pixels"
    if not file.with_suffix(".json").is_file():  # written last: if it exists, the pixels are complete
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(images.with_transform(Compose(steps)), file)
        except OSError as error:
            raise DataError(f"{file}: the cache of decoded images cannot be written ({error})") from error
    return CachedImages(images, file)


def _write(images: Images, file: Path) -> None:
    from rich.console import Console
    from rich.progress import track

    _remove_leftovers(file.parent)
    sizes, terminal = [], Console(stderr=True)
    starts = range(0, len(images), CHUNK)
    # written, not mapped: a full disk is then an error instead of a crash
    with replace_file(file) as stream, ThreadPoolExecutor(os.cpu_count()) as threads:
        hidden = not (terminal.is_interactive and sys.stderr.isatty())
        for start in track(starts, f"decoding {file.name}", console=terminal, transient=True, disable=hidden):
            chunk = range(start, min(start + CHUNK, len(images)))
            for image, _ in threads.map(images.__getitem__, chunk):
                sizes.append((image.height, image.width))
                stream.write(image.tobytes())
    write_file(file.with_suffix(".json"), json.dumps({"sizes": sizes}).encode())


def _remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed have left, which may be gigabytes."""
    for leftover in folder.glob("*.tmp"):
        with suppress(OSError):  # another process may be faster
            if time.time() - leftover.stat().st_mtime > ABANDONED:
                leftover.unlink()


def _hash(images: Images, steps: Iterable[Any]) -> str:
    digest = hashlib.sha256(f"{FORMAT} {list(steps)} {images.exif_rotation}".encode())
    for index in range(len(images.items)):  # some readers cannot be iterated over: they raise other than IndexError
        digest.update(_identity(images.items[index]))
    return digest.hexdigest()[:16]


def _identity(item: Any) -> bytes:
    """The content of pixels and open files; of others size, time, and the path in whichever way it is spelled."""
    if isinstance(item, np.ndarray):
        return item.tobytes()
    if not isinstance(item, str | Path | TarMember):
        return item.read()
    file, place = (item.file, f":{item.name}:{item.offset}") if isinstance(item, TarMember) else (item, "")
    facts = os.stat(file)
    return os.fsencode(f"{os.path.abspath(file)}{place} {facts.st_size} {facts.st_mtime_ns}\n")
