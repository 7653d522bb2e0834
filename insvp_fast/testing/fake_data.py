"""Tiny made-up data sets in the formats of the real ones, so that everything can be tried without a download."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from insvp_fast.data.sets import SETS, SPLITS, VTAB

__all__ = ["FORMATS", "make_fake_dataset"]

FORMATS = ("folder", "list", "wds")
SIDE = 32


def make_fake_dataset(name: str, root: str | Path, images_per_class: int = 2, classes: int | None = None) -> str:
    """Write a data set of noise, whose color tells the class, in the format of the real one.

    Args:
        name: of a set in ``insvp_fast.data.sets``, or of a format: ``folder``, ``list`` or ``wds``.
        root: the folder to write to; made if it does not exist.
        images_per_class: the number in each split.
        classes: the number of classes; None for that of the real set, or 3 for a format.

    Returns:
        The ``source`` for ``load_data``; a named set also needs this ``root``.

    Raises:
        ValueError: if there is no such set or format, or ``images_per_class`` is less than 1.
    """
    if name not in (*SETS, *FORMATS) or images_per_class < 1:
        known = ", ".join((*SETS, *FORMATS))
        raise ValueError(
            f"name is {name}, images_per_class {images_per_class}: expected one of {known}, and at least 1"
        )
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    count = classes or (SETS[name].classes if name in SETS else 3)
    write: Callable[[Path, int, int], Any] = _vtab(name) if name in VTAB else _WRITERS[name]
    write(root, count, images_per_class)
    return name if name in SETS else f"wds/{root}" if name == "wds" else str(root)


@cache
def _pixels(label: int) -> np.ndarray:
    """uint8 [32, 32, 3]: a color of its own for each label, and noise."""
    random = np.random.RandomState(label)
    return (random.randint(0, 200, 3) + random.randint(0, 56, (SIDE, SIDE, 3))).astype(np.uint8)


@cache
def _encoded(label: int, suffix: str) -> bytes:
    stream = io.BytesIO()
    wide = np.pad(_pixels(label), ((0, 0), (0, 8), (0, 0)), mode="reflect")  # 32x40: real images are not square
    Image.fromarray(wide).save(stream, {".jpg": "JPEG", ".ppm": "PPM"}[suffix])
    return stream.getvalue()


def _save(file: Path, label: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(_encoded(label, file.suffix))


def _text(file: Path, lines: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def _each(classes: int, per_class: int) -> Iterator[tuple[int, int]]:
    return ((label, i) for label in range(classes) for i in range(per_class))


def _dtd(root: Path, classes: int, per_class: int) -> None:
    home = root / "dtd" / "dtd"
    for split in SPLITS:
        names = [(f"texture_{c:02d}/texture_{c:02d}_{split}{i}.jpg", c) for c, i in _each(classes, per_class)]
        for name, label in names:
            _save(home / "images" / name, label)
        _text(home / "labels" / f"{split}1.txt", [name for name, _ in names])


def _birds(home: Path, rows: list[tuple[str, str, str, str, int]], classes: list[str]) -> None:
    """Each row is an image id, a path, a class id, 1 for train or 0 for test, and the label that sets the color."""
    for _, path, _, _, label in rows:
        _save(home / "images" / path, label)
    _text(home / "images.txt", [f"{key} {path}" for key, path, *_ in rows])
    _text(home / "image_class_labels.txt", [f"{row[0]} {row[2]}" for row in rows])
    _text(home / "train_test_split.txt", [f"{row[0]} {row[3]}" for row in rows])
    _text(home / "classes.txt", classes)


def _cub(root: Path, classes: int, per_class: int) -> None:
    names = [f"{c + 1:03d}.Bird_{c + 1}" for c in range(classes)]
    each = enumerate(_each(classes, 2 * per_class), 1)
    rows = [(str(n), f"{names[c]}/Bird_{i}.jpg", str(c + 1), str(i % 2), c) for n, (c, i) in each]
    _birds(root / "CUB_200_2011", rows, [f"{c + 1} {name}" for c, name in enumerate(names)])


def _nabirds(root: Path, classes: int, per_class: int) -> None:
    """As in the real set, ids of species have gaps, and classes.txt also names families, which have no images."""
    species = [3 * c + 9 for c in range(classes)]
    rows = []
    for n, (c, i) in enumerate(_each(classes, 2 * per_class)):
        key = f"{n:08x}-0000-4000-8000-{c:012x}"
        rows.append((key, f"{species[c]:04d}/{key.replace('-', '')}.jpg", str(species[c]), str(i % 2), c))
    families = [f"{i} Family {i}" for i in range(8)]
    _birds(root / "nabirds", rows, families + [f"{i} Bird (Adult {i})" for i in species])


def _dogs(root: Path, classes: int, per_class: int) -> None:
    for split in ("train", "test"):
        names = [
            f"n{2085620 + c:08d}-Breed_{c}/n{2085620 + c:08d}_{split}{i}.jpg" for c, i in _each(classes, per_class)
        ]
        labels = [c for c, _ in _each(classes, per_class)]
        for name, label in zip(names, labels, strict=True):
            _save(root / "Images" / name, label)
        columns = {"file_list": names, "annotation_list": [name.removesuffix(".jpg") for name in names]}
        cells: dict[str, Any] = {key: np.array(value, dtype=object)[:, None] for key, value in columns.items()}
        _mat(root / f"{split}_list.mat", cells | {"labels": np.array(labels, dtype=np.uint8)[:, None] + 1})


def _flowers(root: Path, classes: int, per_class: int) -> None:
    home, labels = root / "flowers-102", [c for c, _ in _each(classes, 3 * per_class)]
    for number, label in enumerate(labels, 1):
        _save(home / "jpg" / f"image_{number:05d}.jpg", label)
    numbers = np.arange(1, len(labels) + 1, dtype=np.uint16)
    _mat(home / "imagelabels.mat", {"labels": np.array(labels, dtype=np.uint8)[None] + 1})
    _mat(home / "setid.mat", {name: numbers[None, i::3] for i, name in enumerate(("trnid", "valid", "tstid"))})


def _food101(root: Path, classes: int, per_class: int) -> None:
    home, names = root / "food-101", [f"dish_{c:03d}" for c in range(classes)]
    for start, split in ((0, "train"), (per_class, "test")):
        files = {name: [f"{name}/{start + i}" for i in range(per_class)] for name in names}
        _text(home / "meta" / f"{split}.json", [json.dumps(files)])
        for label, name in enumerate(names):
            for file in files[name]:
                _save(home / "images" / f"{file}.jpg", label)


def _cifar10(root: Path, classes: int, per_class: int) -> None:
    home = root / "cifar-10-batches-py"
    home.mkdir(parents=True, exist_ok=True)
    labels = [c for _, c in sorted((i, c) for c, i in _each(classes, per_class))]
    for i in range(5):
        _batch(
            home / f"data_batch_{i + 1}", labels[i::5], {"labels": labels[i::5], "batch_label": f"batch {i + 1} of 5"}
        )
    _batch(home / "test_batch", labels, {"labels": labels, "batch_label": "testing batch 1 of 1"})
    _pickle(home / "batches.meta", {"label_names": [f"class {c}" for c in range(classes)], "num_vis": 3072})


def _cifar100(root: Path, classes: int, per_class: int) -> None:
    home, labels = root / "cifar-100-python", [c for c, _ in _each(classes, per_class)]
    home.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        _batch(home / split, labels, {"fine_labels": labels, "coarse_labels": [c // 5 for c in labels]})
    _pickle(home / "meta", {"fine_label_names": [f"class {c}" for c in range(classes)], "coarse_label_names": []})


def _batch(file: Path, labels: list[int], facts: dict[str, Any]) -> None:
    data = np.stack([_pixels(label) for label in labels]).transpose(0, 3, 1, 2).reshape(len(labels), 3 * SIDE * SIDE)
    _pickle(file, facts | {"data": data, "filenames": [f"{i}.png" for i in range(len(labels))]})


_Pickler: Any = pickle._Pickler  # type: ignore[attr-defined]  # unlike the one in C, it can be extended to other types


class _Python2Pickler(_Pickler):
    """Writes text and bytes as Python 2 wrote its ``str``, which CIFAR's files hold."""

    def _string(self, value: str | bytes) -> None:
        content = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(content)) + content)
        self.memoize(value)

    dispatch: ClassVar = _Pickler.dispatch | {str: _string, bytes: _string}


def _pickle(file: Path, content: Any) -> None:
    stream = io.BytesIO()
    _Python2Pickler(stream, 2).dump(content)
    file.write_bytes(stream.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def _gtsrb(root: Path, classes: int, per_class: int) -> None:
    home = root / "gtsrb"
    for c, i in _each(classes, per_class):
        _save(home / "GTSRB/Training" / f"{c:05d}" / f"{i // 30:05d}_{i % 30:05d}.ppm", c)
    rows = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    for number, (c, _) in enumerate(_each(classes, per_class)):
        _save(home / "GTSRB/Final_Test/Images" / f"{number:05d}.ppm", c)
        rows.append(f"{number:05d}.ppm;40;32;5;5;35;27;{c}")
    _text(home / "GT-final_test.csv", rows)


def _svhn(root: Path, classes: int, per_class: int) -> None:
    labels = [c for c, _ in _each(classes, per_class)]
    pixels = np.stack([_pixels(label) for label in labels], axis=-1)
    for split in ("train", "test"):
        digits = np.array([label or 10 for label in labels], dtype=np.uint8)[:, None]  # the digit 0 is stored as 10
        _mat(root / f"{split}_32x32.mat", {"X": pixels, "y": digits})


def _mat(file: Path, content: dict[str, Any]) -> None:
    from scipy.io import savemat  # in the function: scipy is optional

    file.parent.mkdir(parents=True, exist_ok=True)
    savemat(file, content)


def _vtab(name: str) -> Callable[[Path, int, int], None]:
    def write(root: Path, classes: int, per_class: int) -> None:
        home, both = root / name.removeprefix("vtab/"), []
        for split in ("train800", "val200", "test"):
            labels = [c for c, _ in _each(classes, per_class)]
            both += labels if split != "test" else []
            _task_split(home, split, labels)
        _task_split(home, "train800val200", both)

    return write


def _task_split(home: Path, split: str, labels: list[int]) -> None:
    names = [f"images/{split}/{i:06d}.jpg" for i in range(len(labels))]
    for name, label in zip(names, labels, strict=True):
        _save(home / name, label)
    _text(home / f"{split}.txt", [f"{name} {label}" for name, label in zip(names, labels, strict=True)])


def _folder(root: Path, classes: int, per_class: int) -> None:
    for split in SPLITS:
        for c, i in _each(classes, per_class):
            _save(root / split / f"class_{c}" / f"{i}.jpg", c)


def _list(root: Path, classes: int, per_class: int) -> None:
    for split in SPLITS:
        rows = [(f"images/{split} {c} {i}.jpg", c) for c, i in _each(classes, per_class)]
        for path, label in rows:
            _save(root / path, label)
        _text(root / f"{split}.txt", [f"{path} {label}" for path, label in rows])


def _wds(root: Path, classes: int, per_class: int) -> None:
    for split in SPLITS:
        with tarfile.open(root / f"{split}-0000.tar", "w") as tar:
            for c, i in _each(classes, per_class):
                for suffix, content in (("jpg", _encoded(c, ".jpg")), ("cls", str(c).encode())):
                    member = tarfile.TarInfo(f"{split}/{c:03d}_{i:03d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


_WRITERS: dict[str, Callable[[Path, int, int], None]] = {
    "dtd": _dtd,
    "cub": _cub,
    "nabirds": _nabirds,
    "dogs": _dogs,
    "flowers": _flowers,
    "food101": _food101,
    "cifar100": _cifar100,
    "cifar10": _cifar10,
    "gtsrb": _gtsrb,
    "svhn": _svhn,
    "folder": _folder,
    "list": _list,
    "wds": _wds,
}
