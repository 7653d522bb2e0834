"""Try a trained model in a browser: drop an image, see its classes, its prompts, Grad-CAM and the attention.

    insvp demo runs/cub-1

The page is at http://127.0.0.1:7860 until Ctrl-C. Nothing is sent to anyone else.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from insvp_fast.commands.options import add_address, add_model, check_address, positive, read_class_names
from insvp_fast.errors import CommandError

SUMMARY = "try a trained model in a browser"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_model(parser)
    add_address(parser, 7860)
    for option, default, text in (
        ("--max-bytes", 16 * 2**20, "bytes of an image"),
        ("--max-pixels", 25_000_000, "pixels of an image, by its header"),
    ):
        parser.add_argument(option, type=positive, metavar="N", default=default, help=f"{text} (default: {default:,})")


def run(
    run: str, backbone: str | None, class_names: str | None, host: str, port: int, max_bytes: int, max_pixels: int
) -> None:
    names = read_class_names(class_names)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported

    from insvp_fast.demo import create_demo, serve_demo
    from insvp_fast.training.prediction import load_classifier

    check_address(host, port)
    demo = create_demo(load_classifier(run, backbone, names), Path(run).resolve().name, max_pixels)
    try:
        address = serve_demo(demo, host, port or None, max_bytes)
    except OSError as error:
        raise CommandError(
            f"--host is {host} and --port {port}: no page can be served there, maybe it is in use"
        ) from error
    print(f"insvp: the demo is at {address}", flush=True)
    demo.block_thread()
