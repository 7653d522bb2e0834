"""Test a trained model: top-1, top-5 and mean per-class accuracy, F1, and the confusion matrix.

Of a model for several labels per image: mean average precision, macro and micro F1, and no confusion matrix. They are
printed. All results are written as eval.json, and the confusion matrix as eval.png, into the folder of the run or
adapter or into --output; for other data (--data), as eval-NAME.json and eval-NAME.png. An adapter needs --data, whose
classes number its own if it does not name them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from insvp_fast.atomic_files import write_file
from insvp_fast.commands.options import (
    add_amp,
    add_json,
    add_loading,
    add_model,
    add_tta,
    make_folder,
    read_class_names,
)
from insvp_fast.data.sets import SETS

SUMMARY = "test a trained model: accuracies and confusion matrix"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_tta(parser)
    add_amp(parser)
    parser.add_argument(
        "--data", metavar="NAME|PATH", help="other data with the same classes (default: the run's test data)"
    )
    parser.add_argument(
        "--root", metavar="FOLDER", help="folder of a named data set, or of a list's images (default: as in training)"
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="folder for the results (default: RUN or ADAPTER; for a name, this one)"
    )
    add_loading(parser)
    add_json(parser)


def run(
    run: str,
    backbone: str | None,
    class_names: str | None,
    tta: str,
    amp: str,
    data: str | None,
    root: str | None,
    output: str | None,
    batch_size: int | None,
    workers: int | None,
) -> dict[str, Any] | None:
    given = read_class_names(class_names)
    folder = make_folder(output or (run if Path(run).is_dir() else "."))

    from insvp_fast.commands.settings import show_options
    from insvp_fast.figures.runs import plot_confusion
    from insvp_fast.training.accelerator import resolve_amp
    from insvp_fast.training.evaluation import evaluate_run
    from insvp_fast.training.metrics import Metrics

    more: dict[str, Any] = {"backbone": backbone, "class_names": given, "tta": tta, "amp": resolve_amp(amp)}
    facts, metrics, is_main_process = evaluate_run(run, data, root, batch_size, workers, **more)
    if not is_main_process:
        return None
    names = facts["class_names"]
    content = facts | metrics.to_dict() | {"per_class": dict(zip(names, metrics.per_class, strict=True))}

    protocol = f", protocol {facts['protocol']}" if "protocol" in facts else ""
    print(f"{facts['data']}: {metrics.images:,} images, {len(names)} classes{protocol}")
    print(metrics)
    if "note" in facts:
        print(f"insvp: {show_options(facts['note'])}", file=sys.stderr)
    file = folder / (f"eval-{_name(data)}.json" if data else "eval.json")
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items()]
    write_file(file, ("{\n" + ",\n".join(lines) + "\n}\n").encode(errors="backslashreplace"))
    picture = file.with_suffix(".png")
    if isinstance(metrics, Metrics):
        plot_confusion(metrics.confusion, names, picture)
    written = [file, picture] if isinstance(metrics, Metrics) else [file]
    print(f"written: {', '.join([str(file), *(other.name for other in written[1:])])}")
    return content | {"written": written}


def _name(data: str) -> str:
    """Of data, for files: a folder's own name, also of ``.``, and the whole name of a named data set."""
    return data.replace("/", "-") if data in SETS else Path(os.path.abspath(data)).name
