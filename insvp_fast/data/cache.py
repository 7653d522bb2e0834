"""Images decoded once: a memory-mapped file of pixels, [N, 3, h, w] in uint8, that all processes share."""

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

from insvp_fast.data.readers import Images, Slice
from insvp_fast.data.transforms import Transform, stored_transform
from insvp_fast.errors import DataError
from insvp_fast.storage import write_file

__all__ = ["Cached", "cached"]

FORMAT = 2  # of the file, and of how images are read
CHUNK = 256  # images decoded between two writings


class Cached(Dataset):
    """Decoded images: an item is (uint8 tensor [3, h, w], class index).

    The tensor lies in the file's mapping; writing to it changes a private copy of its pages.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.classes: list[int] = json.loads(file.with_suffix(".json").read_text())["classes"]
        self.pixels = np.load(file, mmap_mode="c")

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self.pixels[index]), self.classes[index]

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file}  # a loader's worker maps the file too; a pickled mapping would be a copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["file"])  # type: ignore[misc]


def cached(images: Images, preprocessing: dict[str, Any], folder: str | Path, name: str) -> Cached:
    """``images`` as ``stored_transform`` leaves them, from ``folder`` or, the first time, decoded into it.

    The file's name holds a hash of the list of images, their sizes and times, the classes, how images are read and the
    preprocessing: when any of them changes, another file is written. A file gets its name when it is complete; of two
    processes that write the same, the last one stays.

    Raises:
        DataError: if an image cannot be read, or the folder cannot be written to.
    """
    transform = stored_transform(preprocessing)
    file = Path(folder) / f"{name}-{_hash(images, transform)}.npy"
    if not file.with_suffix(".json").is_file():  # written last: where it is, the pixels are complete
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(images.with_transform(transform), file)
        except OSError as error:
            raise DataError(f"--cache: {file} cannot be written ({error})") from error
    return Cached(file)


def _write(images: Images, file: Path) -> None:
    shape = (len(images), *images[0][0].shape)
    pixels = np.empty((CHUNK, *shape[1:]), np.uint8)
    temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        # written, not mapped: a full disk is then an error and not a crash
        with open(temporary, "wb") as stream, ThreadPoolExecutor(os.cpu_count()) as threads:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(stream, header)
            for start in tqdm(range(0, len(images), CHUNK), f"decoding {file.name}", leave=False, disable=None):
                chunk = range(start, min(start + CHUNK, len(images)))
                for i, (image, _) in enumerate(threads.map(images.__getitem__, chunk)):
                    pixels[i] = image
                stream.write(pixels[: len(chunk)].data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    facts = {"images": len(images), "shape": shape, "classes": [int(index) for index in images.classes]}
    write_file(file.with_suffix(".json"), json.dumps(facts).encode())


def _hash(images: Images, transform: Transform) -> str:
    digest = hashlib.sha256(f"{FORMAT} {transform} {images.exif_rotation} {list(images.classes)}".encode())
    for item in images.items:
        digest.update(_identity(item))
    return digest.hexdigest()[:16]


def _identity(item: Any) -> bytes:
    if isinstance(item, np.ndarray):
        return item.tobytes()
    if not isinstance(item, str | Path | Slice):
        return item.read()
    facts = os.stat(item.file if isinstance(item, Slice) else item)
    return f"{item} {facts.st_size} {facts.st_mtime_ns}\n".encode()
