"""The command ``insvp``: train, eval, predict, bench.

Torch is imported when a command runs, so that help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from insvp_fast import __version__
from insvp_fast.training.recipe import BUILTIN, PRECISIONS, CommandError, Recipe

__all__ = ["main"]

INTERRUPTED = 130  # what a shell reports for Ctrl-C


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, 1 for failed work, 2 for a wrong argument, or 130 for Ctrl-C."""
    # read when torch is loaded: threads that spin while they wait make training several times slower on a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = vars(_parser().parse_args(arguments))
    command = options.pop("command")
    try:
        return command(**options)
    except CommandError as error:
        print(f"insvp: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("insvp: interrupted; what was written so far is in the run folder", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if error.name not in ("accelerate", "sklearn", "matplotlib", "tqdm"):
            raise
        print(f"insvp: error: {error.name} is not installed: pip install 'insvp-fast[train]'", file=sys.stderr)
        return 1


def _train(**settings: Any) -> int:
    try:
        recipe = Recipe(**settings)
    except CommandError as error:
        print(f"insvp train: error: {error}", file=sys.stderr)
        return 2
    from insvp_fast.training.run import train

    train(recipe)
    return 0


def _eval(run: str, data: str | None) -> int:
    from insvp_fast.training.run import evaluate_run

    print(f"accuracy {evaluate_run(run, data):.4f}")
    return 0


def _predict(run: str, files: list[str]) -> int:
    from insvp_fast.training.run import predict_files

    rows = predict_files(run, files)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["file", "class", "probability"])
    writer.writerows((file, name, f"{chance:.4f}") for file, name, chance in rows)
    return 0


def _bench(report: str | None, model: str, batch_size: int | None, rounds: int) -> int:
    from insvp_fast import bench

    bench.report(report, model, batch_size, rounds)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="insvp", description="Adapt a frozen Vision Transformer with instance visual prompts (InsVP).")
    parser.add_argument("--version", action="version", version=f"insvp {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="adapt a backbone to a data set", argument_default=argparse.SUPPRESS)
    train.set_defaults(command=_train)
    _add_recipe(train)

    evaluate = commands.add_parser("eval", help="test accuracy of a run")
    evaluate.set_defaults(command=_eval)
    evaluate.add_argument("run", metavar="RUN", help="a folder made by insvp train")
    evaluate.add_argument("--data", metavar="FOLDER", help="an image folder with test or val (default: the run's own)")

    bench = commands.add_parser("bench", help="time InsVP on this machine, beside the bare frozen backbone")
    bench.set_defaults(command=_bench)
    bench.add_argument("--report", metavar="FILE", help="write a table there, in Markdown, and a plot beside it")
    bench.add_argument("--model", metavar="NAME", default="vit_base_patch16_224", help="(default: %(default)s)")
    bench.add_argument("--batch-size", type=_positive, help="images per step (default: 2, on a GPU 64)")
    bench.add_argument("--rounds", type=_positive, default=7, help="timed runs of each kind (default: %(default)s)")

    predict = commands.add_parser("predict", help="classify image files; prints CSV: file, class, probability")
    predict.set_defaults(command=_predict)
    predict.add_argument("run", metavar="RUN", help="a folder made by insvp train")
    predict.add_argument("files", metavar="FILE", nargs="+")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return int(text)


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    """One option per field of ``Recipe``, which holds the defaults and the checks."""
    default = Recipe()

    def option(name: str, kind: Any, text: str, shown: object = None, **more: Any) -> None:
        shown = getattr(default, name.replace("-", "_")) if shown is None else shown
        parser.add_argument(f"--{name}", type=kind, help=f"{text} (default: {shown})", **more)

    option("backbone", str, "a Vision Transformer of timm, NAME or NAME@FILE", f"{BUILTIN}, which is shipped")
    option("checkpoint", str, "its weights: .safetensors, .pth or .npz", "timm's, downloaded", metavar="FILE")
    option("data", str, "an image folder: train and val and/or test", "scikit-learn's digits", metavar="FOLDER")
    option("epochs", int, "passes over the training images")
    option("batch-size", int, "images per step and device")
    option("lr", float, "highest learning rate of InsVP")
    option("probe-lr", float, "highest learning rate of the linear probe")
    option("weight-decay", float, "AdamW's weight decay")
    option("warmup", float, "part of all steps in which the learning rate rises")
    option("amp", str, f"mixed precision: {', '.join(PRECISIONS)}")
    option("seed", int, "of the split, the weights and the order of the images")
    option("prompt-length", int, "prompt tokens in each block", "4 if shipped backbone, else 9; released: 16")
    option("workers", int, "processes that load images")
    option("output", str, "where the run gets its folder", metavar="FOLDER")
    parser.add_argument("--released", action="store_true", help="adapt as the authors' code does, not as in the paper")
    parser.add_argument("--no-probe", action="store_false", dest="probe", help="leave out the linear probe")


if __name__ == "__main__":
    sys.exit(main())
