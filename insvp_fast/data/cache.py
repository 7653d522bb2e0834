"""A cache of decoded images: a memory-mapped file of pixels, uint8 [N, 3, h, w], that all processes share."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from insvp_fast.atomic_files import replace_file, write_file
from insvp_fast.data.images import Images, TarMember
from insvp_fast.data.transforms import Transform, cache_transform
from insvp_fast.errors import DataError

__all__ = ["CachedImages", "cache_images"]

FORMAT = 2  # raised whenever the file's format or the way images are read changes
CHUNK = 256  # images decoded before they are written


class CachedImages(Dataset):
    """Images from a cache; an item is (uint8 tensor [3, h, w], class index or row of 0 and 1).

    The tensor maps the file; writing to it changes a private copy of its pages.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        classes = json.loads(file.with_suffix(".json").read_text())["classes"]
        self.classes: list[int] | Tensor = torch.tensor(classes) if isinstance(classes[0], list) else classes
        self.pixels = np.load(file, mmap_mode="c")

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[Tensor, int | Tensor]:
        return torch.from_numpy(self.pixels[index]), self.classes[index]

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file}  # a data loader's worker maps the file itself; pickling the mapping would copy it

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["file"])  # type: ignore[misc]


def cache_images(images: Images, preprocessing: dict[str, Any], folder: str | Path, name: str) -> CachedImages:
    """Images as ``cache_transform`` gives them: decoded and written to ``folder`` the first time, read from it later.

    The file's name holds a hash of the images' paths, sizes, times and classes, of the preprocessing and of how images
    are read: if any of these changes, another file is written. Files appear under their name only when complete; of two
    processes that write the same one, the last wins.

    Raises:
        DataError: if an image cannot be read, or the folder cannot be written to.
    """
    transform = cache_transform(preprocessing)
    file = Path(folder) / f"{name}-{_hash(images, transform)}.npy"
    if not file.with_suffix(".json").is_file():  # written last: if it exists, the pixels are complete
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(images.with_transform(transform), file)
        except OSError as error:
            raise DataError(f"{file}: the cache of decoded images cannot be written ({error})") from error
    return CachedImages(file)


def _write(images: Images, file: Path) -> None:
    shape = (len(images), *images[0][0].shape)
    pixels = np.empty((CHUNK, *shape[1:]), np.uint8)
    # written, not mapped: a full disk is then an error instead of a crash
    with replace_file(file) as stream, ThreadPoolExecutor(os.cpu_count()) as threads:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        for start in tqdm(range(0, len(images), CHUNK), f"decoding {file.name}", leave=False, disable=None):
            chunk = range(start, min(start + CHUNK, len(images)))
            for i, (image, _) in enumerate(threads.map(images.__getitem__, chunk)):
                pixels[i] = image
            stream.write(pixels[: len(chunk)].data)
    facts = {"images": len(images), "shape": shape, "classes": np.asarray(images.classes).tolist()}
    write_file(file.with_suffix(".json"), json.dumps(facts).encode())


def _hash(images: Images, transform: Transform) -> str:
    classes = np.asarray(images.classes).tolist()
    digest = hashlib.sha256(f"{FORMAT} {transform} {images.exif_rotation} {classes}".encode())
    for item in images.items:
        digest.update(_identity(item))
    return digest.hexdigest()[:16]


def _identity(item: Any) -> bytes:
    """The content of pixels and open files; path, size and time of others."""
    if isinstance(item, np.ndarray):
        return item.tobytes()
    if not isinstance(item, str | Path | TarMember):
        return item.read()
    facts = os.stat(item.file if isinstance(item, TarMember) else item)
    return f"{item} {facts.st_size} {facts.st_mtime_ns}\n".encode()
