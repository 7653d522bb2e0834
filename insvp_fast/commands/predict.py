"""Classify image files, or all images in folders, with a trained model.

CSV has one line per image: file, class, probability; with --top-k, further pairs of class and probability follow. With
--format jsonl, each line is an object: {"file": ..., "classes": [...], "probabilities": [...]}, likeliest class first.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from insvp_fast.atomic_files import replace_file
from insvp_fast.commands.options import add_loading, positive
from insvp_fast.errors import CommandError

SUMMARY = "classify image files with a trained model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder of `insvp train`")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="an image, or a folder to search for images")
    parser.add_argument("--top-k", type=positive, metavar="K", default=1, help="classes per image (default: 1)")
    parser.add_argument("--format", choices=["csv", "jsonl"], default="csv", help="format of the output (default: csv)")
    parser.add_argument("--output", metavar="FILE", help="write to a file (default: print)")
    parser.add_argument("--skip-unreadable", action="store_true", help="skip files that are not readable images")
    add_loading(parser)


def run(
    run: str,
    paths: list[str],
    top_k: int,
    format: str,
    output: str | None,
    skip_unreadable: bool,
    batch_size: int | None,
    workers: int | None,
) -> int:
    from insvp_fast.training.prediction import find_images, predict

    files, skipped = find_images(paths), 0

    def readable() -> Iterator[Any]:
        nonlocal skipped
        for prediction in predict(run, files, top_k, batch_size, workers):
            if prediction.error is None:
                yield prediction
            elif skip_unreadable:
                skipped += 1
                print(f"insvp: skipped {prediction.error}", file=sys.stderr)
            else:
                raise CommandError(f"{prediction.error}; --skip-unreadable goes on without such files")

    with _open_output(output) as stream:
        (_write_csv if format == "csv" else _write_jsonl)(readable(), top_k, stream)
    if skipped:
        print(f"insvp: skipped {skipped} of {len(files)} files", file=sys.stderr)
    return 0


def _write_csv(predictions: Iterable[Any], top_k: int, stream: IO) -> None:
    writer = csv.writer(stream, lineterminator="\n")
    more = [name for rank in range(2, top_k + 1) for name in (f"class_{rank}", f"probability_{rank}")]
    writer.writerow(["file", "class", "probability", *more])
    for file, ranking, _ in predictions:
        writer.writerow([file, *(cell for name, probability in ranking for cell in (name, f"{probability:.4f}"))])


def _write_jsonl(predictions: Iterable[Any], top_k: int, stream: IO) -> None:
    for file, ranking, _ in predictions:
        names, probabilities = zip(*ranking, strict=True)
        line = {"file": file, "classes": names, "probabilities": [round(value, 6) for value in probabilities]}
        print(json.dumps(line, ensure_ascii=False), file=stream)


@contextlib.contextmanager
def _open_output(output: str | None) -> Iterator[IO]:
    """Standard output, or a file that appears once it is complete. File names that are not UTF-8 are escaped."""
    if output is None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        yield sys.stdout
        return
    try:
        with replace_file(Path(output), "w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
            yield stream
    except OSError as error:
        raise CommandError(f"--output is {output}: cannot be written ({error})") from error
