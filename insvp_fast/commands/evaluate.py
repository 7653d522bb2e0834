"""Test a trained model: top-1, top-5, the mean over the classes, and who is taken for whom.

Prints the figures and writes them as JSON, with the confusion matrix as a picture beside: into the run folder as
eval.json and eval.png, for other data as eval-NAME.json and eval-NAME.png, or into --output.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from insvp_fast.commands.options import add_loading
from insvp_fast.storage import write_file

SUMMARY = "test a trained model: accuracies and a confusion matrix"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a folder made by insvp train")
    parser.add_argument(
        "--data", metavar="NAME|FOLDER", help="other data with the same classes (default: what the run was tested on)"
    )
    parser.add_argument("--root", metavar="FOLDER", help="where the named data set is (default: as in training)")
    parser.add_argument("--output", metavar="FOLDER", help="where the files go (default: the run folder)")
    add_loading(parser)


def run(
    run: str, data: str | None, root: str | None, output: str | None, batch_size: int | None, workers: int | None
) -> int:
    from insvp_fast.training.evaluation import evaluate_run
    from insvp_fast.training.figures import draw_confusion

    facts, figures, reports = evaluate_run(run, data, root, batch_size, workers)
    if not reports:
        return 0
    names = facts["class_names"]
    named = {"per_class": dict(zip(names, figures.per_class, strict=True)), "confusion": figures.confusion.tolist()}
    content = facts | figures._asdict() | {"images": figures.images} | named

    folder = Path(output or run)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / (f"eval-{Path(data).name}.json" if data else "eval.json")
    lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in content.items()]
    write_file(file, ("{\n" + ",\n".join(lines) + "\n}\n").encode(errors="backslashreplace"))
    draw_confusion(figures.confusion, names, file.with_suffix(".png"))

    print(f"{facts['data']}: {figures.images:,} images, {len(names)} classes, protocol {facts['protocol']}")
    print(f"top-1 {figures.top1:.2%}   top-5 {figures.top5:.2%}   mean per class {figures.mean_per_class:.2%}")
    print(f"written: {file}, {file.with_suffix('.png').name}")
    return 0
