"""Time InsVP on this machine, beside the bare frozen backbone: inference and training steps, alternating."""

from __future__ import annotations

import argparse

from insvp_fast.commands.options import positive

SUMMARY = "time InsVP on this machine, beside the bare frozen backbone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--report", metavar="FILE", help="write a table there, in Markdown, and a plot beside it")
    parser.add_argument("--model", metavar="NAME", default="vit_base_patch16_224", help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, metavar="N", help="images per step (default: 2, on a GPU 64)")
    parser.add_argument(
        "--rounds", type=positive, metavar="N", default=7, help="timed runs of each kind (default: %(default)s)"
    )


def run(report: str | None, model: str, batch_size: int | None, rounds: int) -> int:
    from insvp_fast import bench

    bench.report(report, model, batch_size, rounds)
    return 0
