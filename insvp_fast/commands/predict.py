"""Classify image files, or all images in folders of any size, with a trained model.

CSV has one line per image: file, class, probability; with --top-k, further pairs of class and probability follow.
Parquet has the same columns. With --format jsonl, each line is an object: {"file": ..., "classes": [...],
"probabilities": [...]}, likeliest class first. A command that was interrupted goes on where it stopped if it is given
again, and writes the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from insvp_fast.commands.options import (
    add_amp,
    add_loading,
    add_model,
    add_tta,
    output_file,
    positive,
    read_class_names,
)
from insvp_fast.errors import CommandError

SUMMARY = "classify image files with a trained model"
FORMATS = ("csv", "jsonl", "parquet")
Classify = Callable[[Iterable[str]], Iterator[Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_tta(parser)
    add_amp(parser)
    parser.add_argument("paths", metavar="PATH", nargs="+", help="an image, or a folder to search for images")
    parser.add_argument("--top-k", type=positive, metavar="K", default=1, help="classes per image (default: 1)")
    parser.add_argument(
        "--format", choices=FORMATS, help="format of the output (default: the one that FILE ends in, else csv)"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write to a file, which is in place once it is complete (default: print)"
    )
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="K/N",
        default=(1, 1),
        help="classify the K-th of N parts of the images, K from 1 on, beside N - 1 other such commands, each with an"
        " --output of its own",
    )
    parser.add_argument("--skip-unreadable", action="store_true", help="skip files that are not readable images")
    add_loading(parser)


def shard(text: str) -> tuple[int, int]:
    """The argparse type of K/N."""
    found = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text}: expected K/N with K from 1 to N, such as 1/4")
    return int(found[1]), int(found[2])


def run(
    run: str,
    backbone: str | None,
    class_names: str | None,
    tta: str,
    amp: str,
    paths: list[str],
    top_k: int,
    format: str | None,
    output: str | None,
    shard: tuple[int, int],
    skip_unreadable: bool,
    batch_size: int | None,
    workers: int | None,
) -> None:
    format = _check(format, output, shard)
    names = read_class_names(class_names)

    from insvp_fast.data.image_list import ImageList
    from insvp_fast.training.accelerator import resolve_amp
    from insvp_fast.training.load import adapter_sha256, load_run
    from insvp_fast.training.prediction import Classifier, predict

    images = ImageList(paths, shard)
    loaded = load_run(run, backbone, names)
    classifier = Classifier(loaded, tta, amp := resolve_amp(amp))
    top_k, loading = min(top_k, len(classifier.class_names)), loaded.loading(batch_size, workers)

    def classify(files: Iterable[str]) -> Iterator[Any]:
        for prediction in predict(classifier, files, top_k, *loading):
            if prediction.error is not None:
                if not skip_unreadable:
                    raise CommandError(f"{prediction.error}; --skip-unreadable goes on without such files")
                print(f"insvp: skipped {prediction.error}", file=sys.stderr)  # above the bar, if there is one
            yield prediction

    if output is None:
        skipped = _print_rows(classify, images, format, top_k)
    else:
        settings = {"adapter": adapter_sha256(run), "class_names": _sha256(names), "tta": tta, "amp": amp}
        skipped = _write_rows(classify, images, Path(output), format, top_k, loading[0], settings, skip_unreadable)
    if skipped:
        print(f"insvp: skipped {skipped} of {len(images)} files", file=sys.stderr)


def _sha256(names: list[str] | None) -> str:
    return hashlib.sha256("\n".join(names or []).encode()).hexdigest()


def _check(format: str | None, output: str | None, shard: tuple[int, int]) -> str:
    """The format, once the options are known to fit each other and what is installed."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise CommandError(
            "started as several processes, which would all write the same: expected one, with --shard K/N"
        )
    suffix = Path(output or "").suffix.removeprefix(".")
    format = format or (suffix if suffix in FORMATS else "csv")
    if format == "parquet":
        if output is None:
            raise CommandError("--format is parquet: expected --output, a file to write it to")
        import pyarrow.parquet  # noqa: F401 (if it is missing, this is told before the work)
    if output is not None:
        output_file(output)
    return format


def _print_rows(classify: Classify, images: Any, format: str, top_k: int) -> int:
    """Print a line for each image. Returns the number of those that were skipped."""
    from insvp_fast.training.counter import Counter
    from insvp_fast.training.prediction_file import row_writer

    write_row, skipped = row_writer(sys.stdout, format, top_k), 0
    with Counter("predict", len(images), silent=sys.stdout.isatty()) as counter:  # there the lines are the progress
        for prediction in classify(images):
            if prediction.error is None:
                write_row(prediction)
            else:
                skipped += 1
            counter.add(1)
    return skipped


def _write_rows(
    classify: Classify,
    images: Any,
    file: Path,
    format: str,
    top_k: int,
    batch_size: int,
    settings: dict[str, str],
    skip_unreadable: bool,
) -> int:
    """Write the file, or go on with it. Returns the number of images that were skipped."""
    from insvp_fast.training.counter import Counter
    from insvp_fast.training.prediction_file import PredictionFile

    try:
        with PredictionFile(file, images, format, top_k, batch_size, settings) as predictions:
            if predictions.skipped and not skip_unreadable:  # the other way round, no row is missing
                begun = f"{predictions.part} was begun with --skip-unreadable, and {predictions.skipped} were skipped"
                raise CommandError(f"{begun}: expected the same, or remove it to begin anew")
            if predictions.images:
                print(f"insvp: goes on after {predictions.images:,} of {len(images):,} images", file=sys.stderr)
            with Counter("predict", len(images), predictions.images) as counter:
                for prediction in classify(predictions.remaining):
                    predictions.add(prediction)
                    counter.add(1)
            predictions.finish()
    except OSError as error:
        raise CommandError(f"--output is {file}: cannot be written ({error})") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on with the predictions") from None
    return predictions.skipped
