"""Data sets prepared by TensorFlow Datasets, read in any order and without TensorFlow."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from insvp_fast.data.sets import SPLIT_NAMES
from insvp_fast.errors import DataError

__all__ = ["EncodedImages", "TFRecords", "read_tfds"]


class EncodedImages(Sequence):
    """The image files in the examples of a split, each as an open file.

    Args:
        records: the serialized examples.
        parse: turns a record into the fields of the example, with the image still encoded.
    """

    def __init__(self, records: Sequence[bytes], parse: Callable[[bytes], dict[str, Any]]) -> None:
        self.records, self.parse = records, parse

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return io.BytesIO(self.parse(self.records[index])["image"])

    def labels(self) -> list[Any]:
        """The label of each image; reads all examples once, and decodes no image."""
        return [self.parse(self.records[index])["label"] for index in range(len(self))]


class TFRecords(Sequence):
    """The records of TFRecord files, which are indexed once and read in any order.

    A record is its length, 8 bytes, a checksum of 4, the content, and a checksum of 4.

    Raises:
        DataError: if a file ends within a record.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.files = [str(file) for file in files]
        # of each record the number of its file, its offset and its length
        self.places = np.concatenate([_places(number, file) for number, file in enumerate(self.files)])

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        number, offset, length = self.places[index].tolist()
        with open(self.files[number], "rb") as stream:
            stream.seek(offset)
            return stream.read(length)


def _places(number: int, file: str) -> np.ndarray:
    places: list[tuple[int, int, int]] = []
    with open(file, "rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        end = 0
        while end < size:
            stream.seek(end)
            header = stream.read(8)
            length = struct.unpack("<Q", header)[0] if len(header) == 8 else size
            places.append((number, end + 12, length))
            end += 12 + length + 4
    if end != size:
        raise DataError(f"{file}: ends within a record: expected a whole TFRecord file")
    return np.array(places, np.int64).reshape(-1, 3)


def read_tfds(source: str, root: str | None) -> tuple[dict[str, EncodedImages], list[str]]:
    """The images of each split of ``tfds/NAME``, and the names of its classes, none if they have no names.

    Args:
        root: the folder that holds prepared data sets; None for the library's own.

    Raises:
        DataError: if the package is missing, the data set is not prepared, or its examples have no image and label.
    """
    try:
        import tensorflow_datasets as tfds  # in the function: it is optional
    except ImportError as error:
        raise DataError(f"`data` is {source}, which needs a package: pip install tensorflow-datasets") from error
    try:
        builder = tfds.builder(source.removeprefix("tfds/"), data_dir=root)
        features: Any = builder.info.features or {}
        splits = builder.info.splits
        found = {split: name for split, names in SPLIT_NAMES.items() for name in names if name in splits}
        records = {split: _records(builder, name, tfds) for split, name in found.items()}
    except Exception as error:  # the library raises errors of many types where a data set or package does not exist
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"`data` is {source}: cannot be opened in {root or 'the default folder'} ({reason})") from error
    if not {"image", "label"} <= set(features):
        raise DataError(f"`data` is {source}: found {', '.join(features)}: expected the fields image and label")
    parse = partial(features.deserialize_example_np, decoders={"image": tfds.decode.SkipDecoding()})
    names = getattr(features["label"], "names", None) or []
    return {split: EncodedImages(of_split, parse) for split, of_split in records.items()}, list(names)


def _records(builder: Any, split: str, tfds: Any) -> Sequence[bytes]:
    """The serialized examples of a split."""
    if builder.info.file_format.value == "tfrecord":  # which the library reads from the beginning only
        return TFRecords([shard.filename for shard in builder.info.splits[split].file_instructions])
    return builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
