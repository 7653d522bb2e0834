"""Time InsVP and the bare frozen backbone on this machine: inference and training steps, alternating."""

from __future__ import annotations

import argparse
from typing import Any

from insvp_fast.commands.options import add_json, positive

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
    from insvp_fast.bench.report import run_benchmark

    return {"rows": run_benchmark(report, model, batch_size, rounds)}
