"""Files of predictions: their formats, and how one that was interrupted goes on."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Self

from insvp_fast.atomic_files import replace_file, write_file
from insvp_fast.errors import TrainingError
from insvp_fast.training.prediction import Prediction
from insvp_fast.training.run_lock import acquire

__all__ = ["PredictionFile", "row_writer"]

COMMIT_SECONDS = 5.0  # an interruption loses at most the work of this time and of one batch
BEFORE = {"amp": "off"}  # settings that earlier versions do not record
ROW_GROUP = 2**24  # bytes of CSV that become a row group of Parquet


def row_writer(stream: IO[str], form: str, top_k: int, header: bool = True) -> Callable[[Prediction], None]:
    """A function that writes a prediction as a line of CSV or JSON, or as the CSV from which Parquet is made.

    Args:
        top_k: the number of classes in each line.
        header: whether to write the names of the columns.
    """
    if form == "jsonl":
        return lambda prediction: print(_json(prediction), file=stream)
    digits = ".4f" if form == "csv" else ".9g"  # 9 tell all numbers of fp32 apart

    def write(cells: Iterable[str]) -> None:
        stream.write(",".join(map(_quoted, cells)) + "\n")

    if header:
        write(_columns(top_k))

    def write_row(prediction: Prediction) -> None:
        pairs = ((name, format(probability, digits)) for name, probability in prediction.ranking)
        write([prediction.file, *(cell for pair in pairs for cell in pair)])

    return write_row


def _quoted(cell: str) -> str:
    """A cell of CSV; ``csv.writer`` does not quote a carriage return that does not end its lines."""
    return '"' + cell.replace('"', '""') + '"' if re.search('[",\r\n]', cell) else cell


def _columns(top_k: int) -> list[str]:
    more = [name for rank in range(2, top_k + 1) for name in (f"class_{rank}", f"probability_{rank}")]
    return ["file", "class", "probability", *more]


def _json(prediction: Prediction) -> str:
    names, probabilities = zip(*prediction.ranking, strict=True)
    line = {"file": prediction.file, "classes": names, "probabilities": [round(value, 6) for value in probabilities]}
    return json.dumps(line, ensure_ascii=False)


class PredictionFile:
    """A file that is in place once it is complete; until then its rows are in FILE.part, and FILE.part.json says which.

    Every few seconds the rows are made safe on the disk, then the length of FILE.part and a digest of the images in it,
    their names, sizes and times of change, are recorded. Made again with the same arguments, the file goes on there:
    what is behind is cut off, to be written again.

    Args:
        images: what the rows are for, in order.
        form: ``csv``, ``jsonl`` or ``parquet``.
        top_k: the number of classes in each row.
        batch_size: of the batches that images are computed in, which must not change: it goes on after a whole one.
        settings: all else that the rows depend on.

    Attributes:
        remaining: the images to be classified.
        images, skipped: the numbers of images done, and of those among them that have no row.

    Raises:
        TrainingError: if FILE.part was begun with other settings or images, what is recorded of it is damaged, or
            another process writes it.
        OSError: if the file cannot be written.
    """

    def __init__(
        self, file: Path, images: Iterable[str], form: str, top_k: int, batch_size: int, settings: Mapping[str, str]
    ) -> None:
        self.file, self.form, self.batch_size = file, form, batch_size
        self.settings = {"format": form, "top_k": top_k, "batch_size": batch_size, **settings}
        self.part, self.record = (file.with_name(file.name + ending) for ending in (".part", ".part.json"))
        self.remaining, self.images, self.skipped, self.digest = iter(images), 0, 0, hashlib.sha256()
        # file names that are not UTF-8 are escaped
        self.stream = open(self.part, "a", encoding="utf-8", errors="backslashreplace", newline="")  # noqa: SIM115
        try:
            resumed = self._begin()
        except BaseException:
            self.stream.close()
            raise
        self.last_commit = time.monotonic()
        self.write_row = row_writer(self.stream, form, top_k, header=not resumed)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.stream.close()
        if kind is not None and not self.record.exists():  # nothing to go on from
            self.part.unlink()

    def add(self, prediction: Prediction) -> None:
        """Write the row of the next image; none, if the image could not be read."""
        self._count(prediction.file)
        if prediction.error is None:
            self.write_row(prediction)
        else:
            self.skipped += 1
        if self.images % self.batch_size == 0 and time.monotonic() - self.last_commit >= COMMIT_SECONDS:
            self._commit()

    def finish(self) -> None:
        """Put the file in its place."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        if self.form == "parquet":
            _write_parquet(self.part, self.file)
            self.part.unlink()
        else:
            os.replace(self.part, self.file)
        self.record.unlink(missing_ok=True)

    def _commit(self) -> None:
        self.stream.flush()
        os.fsync(self.stream.fileno())
        facts = {"settings": self.settings, "images": self.images, "skipped": self.skipped}
        facts |= {"sha256": self.digest.hexdigest(), "bytes": os.fstat(self.stream.fileno()).st_size}
        write_file(self.record, json.dumps(facts).encode())
        self.last_commit = time.monotonic()

    def _count(self, image: str) -> None:
        self.images += 1
        try:
            status = os.stat(image)
            version = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:  # it counts as unreadable
            version = ""
        self.digest.update(os.fsencode(image) + b"\0" + version.encode() + b"\0")

    def _begin(self) -> bool:
        """Make FILE.part what this command goes on with; returns whether an earlier one left something."""
        if not acquire(self.stream, self.part, "write it by one process alone"):
            raise TrainingError(
                f"{self.part} is being written by another process: expected one, or --shard K/N with a file for each"
            )
        if resumed := self.record.exists() and self.part.stat().st_size > 0:
            self._resume()
        else:
            self.record.unlink(missing_ok=True)  # of a file that was put in its place
            os.truncate(self.part, 0)
        return resumed

    def _resume(self) -> None:
        """Pass over the images that are done, and cut off what was not recorded."""
        remedy = f"or remove {self.part} to begin anew"
        try:
            facts = json.loads(self.record.read_bytes())
            settings, digest = BEFORE | dict(facts["settings"]), str(facts["sha256"])
            images, self.skipped, size = (int(facts[name]) for name in ("images", "skipped", "bytes"))
            if min(images, self.skipped, size) < 0:
                raise ValueError("a negative number")
        except (KeyError, TypeError, ValueError) as error:
            problem = f"{self.record} does not say what is in {self.part.name}: {error}"
            raise TrainingError(f"{problem}: expected what an interrupted command leaves, {remedy}") from error
        for name, value in self.settings.items():
            if (begun := settings.get(name)) != value:
                raise TrainingError(
                    f"{self.part} was begun with {name} {begun}, not {value}: expected the same, {remedy}"
                )
        for image in islice(self.remaining, images):
            self._count(image)
        if self.digest.hexdigest() != digest or self.part.stat().st_size < size:
            raise TrainingError(
                f"{self.part} was begun with other images, or they have changed: expected the same, {remedy}"
            )
        os.truncate(self.part, size)


def _write_parquet(source: Path, file: Path) -> None:
    """Turn the CSV of ``row_writer`` into Parquet, a block of rows at a time."""
    import pyarrow.csv
    import pyarrow.parquet

    with open(source, newline="", encoding="utf-8") as stream:
        columns = next(csv.reader(stream))
    types = {name: pyarrow.float32() if name.startswith("probability") else pyarrow.string() for name in columns}
    reader = pyarrow.csv.open_csv(
        source,
        pyarrow.csv.ReadOptions(block_size=ROW_GROUP),
        pyarrow.csv.ParseOptions(newlines_in_values=True),
        pyarrow.csv.ConvertOptions(column_types=types),
    )
    with replace_file(file) as output, pyarrow.parquet.ParquetWriter(output, reader.schema) as writer:
        for rows in reader:
            writer.write_batch(rows)
