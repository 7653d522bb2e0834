"""Serve trained models over HTTP: images in, JSON out.

    insvp serve runs/cub-1 --port 8000
    curl --data-binary @bird.jpg -H "Content-Type: image/jpeg" "localhost:8000/predict?top_k=3"
    curl -F file=@a.jpg -F file=@b.jpg localhost:8000/predict

Ctrl-C or SIGTERM stops it after the requests that are running.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from insvp_fast.commands.options import add_address, add_model, check_address, integer, positive, read_class_names
from insvp_fast.errors import CommandError
from insvp_fast.training import setting

SUMMARY = "serve trained models over HTTP"
THREADS = setting.Limits(lambda number: 1 <= number <= 1024, "1 to 1024")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    text = "a run folder, an adapter folder, or the name of an adapter on the Hub; requests name it by the last part,"
    text += " or by NAME of NAME=RUN"
    add_model(parser, "runs", nargs="+", help=text)
    add_address(parser, 8000)
    for option, default, text in (
        ("--max-batch", 8, "images computed together"),
        ("--max-bytes", 16 * 2**20, "bytes of a request"),
        ("--max-images", 16, "images of a request"),
        ("--max-pixels", 25_000_000, "pixels of an image, by its header"),
        ("--max-requests", 64, "requests answered at once; further ones get status 503"),
        ("--workers", 2, "threads that decode images"),
    ):
        parser.add_argument(option, type=positive, metavar="N", default=default, help=f"{text} (default: {default:,})")
    parser.add_argument(
        "--max-wait-ms",
        type=milliseconds,
        metavar="MS",
        default=5.0,
        help="how long an image waits for others to be computed with (default: 5)",
    )
    parser.add_argument(
        "--threads", type=integer(THREADS), metavar="N", help="CPU threads of the model (default: PyTorch's)"
    )


def milliseconds(text: str) -> float:
    """The argparse type of a time that may be zero."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected milliseconds, at least 0")
    return value


def run(
    runs: list[str],
    backbone: str | None,
    class_names: str | None,
    host: str,
    port: int,
    max_batch: int,
    max_bytes: int,
    max_images: int,
    max_pixels: int,
    max_requests: int,
    workers: int,
    max_wait_ms: float,
    threads: int | None,
) -> None:
    names = read_class_names(class_names)
    if len(runs) > 1 and (names or backbone):
        raise CommandError(f"--backbone or --class-names for {len(runs)} models: expected one RUN with them")

    import python_multipart  # noqa: F401 (if it is missing, this is told before the first form)
    import torch
    import uvicorn

    from insvp_fast.data.lists import escaped
    from insvp_fast.serving.app import create_app
    from insvp_fast.serving.uploads import Limits
    from insvp_fast.training.prediction import load_classifier

    if threads is not None:
        torch.set_num_threads(threads)
    folders = name_models(runs)
    check_address(host, port)
    classifiers = {escaped(name): load_classifier(folder, backbone, names) for name, folder in folders.items()}
    limits = Limits(max_bytes, max_images, max_pixels, max_requests)
    app = create_app(classifiers, limits, max_batch, max_wait_ms / 1000, workers)
    print(f"insvp: serving {', '.join(classifiers)}", flush=True)
    uvicorn.run(app, host=host, port=port, access_log=False)


def name_models(runs: Sequence[str]) -> dict[str, str]:
    """What is loaded for each model by its name; each of ``runs`` is that, or NAME=RUN.

    Raises:
        CommandError: if two have the same name, or one has none.
    """
    folders: dict[str, str] = {}
    for text in runs:
        name, given, folder = text.partition("=")
        if not given or Path(text).exists():
            name, folder = Path(text).resolve().name, text
        if not (name and folder):
            raise CommandError(f"{text} names no model: expected RUN or NAME=RUN")
        if name in folders:
            raise CommandError(f"{folders[name]} and {folder} are both named {name}: expected NAME=RUN for one")
        folders[name] = folder
    return folders
