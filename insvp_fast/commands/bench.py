"""Time InsVP and the bare frozen backbone on this machine: inference and training steps, alternating."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from insvp_fast.commands.options import add_json, output_file, positive
from insvp_fast.errors import CommandError

SUMMARY = "time InsVP against the bare frozen backbone on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report", metavar="FILE", help="write a Markdown table to FILE, and a plot beside it")
    parser.add_argument(
        "--model", metavar="NAME", default="vit_base_patch16_224", help="timm model name (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images per step (default: 2, on a GPU 64)")
    parser.add_argument(
        "--rounds", type=positive, metavar="N", default=7, help="timed runs of each kind (default: %(default)s)"
    )

    add_json(parser)


def run(report: str | None, model: str, batch_size: int | None, rounds: int) -> dict[str, Any]:
    if report is not None:
        _check_report(Path(report))
    check_model(model)
    from insvp_fast.bench.report import run_benchmark

    return {"rows": run_benchmark(report, model, batch_size, rounds)}


def _check_report(file: Path) -> None:
    """Check that report and plot can be written, before minutes of measurements."""
    if file.suffix == ".png":
        raise CommandError(f"--report is {file}: expected another ending, the plot beside it is a .png")
    output_file(file, "--report")
    output_file(file.with_suffix(".png"), "--report")


def check_model(name: str, **backbone_kwargs: Any) -> None:
    """Check that the needed operations of a model are known.

    Raises:
        CommandError: if timm has no such model, or the operations are not known.
    """
    import timm
    import torch

    from insvp_fast.bench.floor import require_known

    if not timm.is_model(name):
        raise CommandError(
            f"--model is {name}: timm has no such model: expected a VisionTransformer, SwinTransformer, Beit or Eva"
        )
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):  # of shipped weights, which stay unread
            require_known(timm.create_model(name, **backbone_kwargs))
    except (RuntimeError, TypeError, ValueError) as error:  # of a tag that the model does not have, say
        raise CommandError(f"--model is {name}: {error}") from error
