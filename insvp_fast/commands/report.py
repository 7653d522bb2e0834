"""Write one HTML file about a run: results, curves, confusion matrix, the worst mistakes with their prompts, settings.

The model is tested anew, in fp32. The file needs no other file and no network, and has no scripts: it can be sent as it
is. It holds the mistaken images, and the names of their files.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from insvp_fast.atomic_files import write_file
from insvp_fast.commands.diagnostics import run_warnings
from insvp_fast.commands.options import add_backbone, add_json, add_loading, output_file, positive

SUMMARY = "write an HTML page about a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder of `insvp train`")
    add_backbone(parser)
    parser.add_argument(
        "--mistakes", type=positive, metavar="N", default=12, help="show at most so many mistakes (default: 12)"
    )
    parser.add_argument("--output", metavar="FILE", help="the file to write (default: report.html, in RUN)")
    add_loading(parser)
    add_json(parser)


def run(
    run: str, backbone: str | None, mistakes: int, output: str | None, batch_size: int | None, workers: int | None
) -> dict[str, Any]:
    from insvp_fast.report.page import render
    from insvp_fast.report.results import find_results

    warnings, file = list(run_warnings(Path(run))), output_file(output or Path(run) / "report.html")
    results = find_results(run, mistakes, batch_size, workers, backbone)
    write_file(file, render(run, results, warnings).encode())
    print(f"{results.metrics}   {results.wrong:,} of {results.metrics.images:,} images are mistakes")
    print(f"written: {file}, {file.stat().st_size / 2**20:.1f} MiB")
    return {"file": str(file), "images": results.metrics.images, "mistakes": results.wrong, "warnings": warnings}
