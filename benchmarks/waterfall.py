"""What each technique brings: a row for each, from the authors' arithmetic to InsVPViT with everything on.

python -m benchmarks.waterfall --precision fp32 --batch 4

Each row is measured in a process of its own, since the native library is selected once per process. In each the bare
timm ViT and the row's model run in turn, so that ratios to it can be compared on a busy machine. The errors, of the
logits and of the gradient that is off the most, are relative to float64, without dropout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks import results
from benchmarks.cuda_graphs import graphed
from benchmarks.models import make_model, without_dropout
from benchmarks.parity import errors, expected
from insvp_fast.bench.jobs import AUTOCAST_DTYPES, forward_backward, training_step
from insvp_fast.bench.models import CONFIGS
from insvp_fast.bench.timing import Row, alternate, peak_bytes, saved_mb_per_image, summarize
from insvp_fast.commands.bench import check_model
from insvp_fast.commands.options import positive
from insvp_fast.errors import InsVPError
from insvp_fast.runtime import hardware, products
from insvp_fast.testing import DEVICE

JOB = "training step"


@dataclasses.dataclass(frozen=True)
class Technique:
    title: str
    provider: str = "insvp_fast"
    config: str = "paper"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of InsVPViT
    packed: bool = True  # frozen weights are packed for this CPU; else PyTorch multiplies by them as by any weight
    native: bool = True
    graph: bool = False


def techniques() -> list[Technique]:
    """The rows, in order, without those that need another device."""
    off = {"attention": "sdpa", "compile_prompters": False, "fold_norm": False, "recompute": "none"}
    off |= {"cuda_graphs": False}
    rows = [
        Technique("release, as released", "released", "released"),
        Technique("release, backbone frozen", "released frozen", "released"),
        Technique("specific prompter once", "reference", "released"),
        Technique("the paper's prompters", "reference"),
        Technique("exact savings", options=off, packed=False, native=False),
        Technique("+ frozen weights packed", options=off, native=False),
        Technique("+ native library", options=off),
        Technique("+ attention of its own", options=off | {"attention": "auto"}),
        Technique("+ norms folded", options={"fold_norm": True, "compile_prompters": False, "cuda_graphs": False}),
        Technique("+ defaults of InsVPViT"),
        Technique("+ compiled", "insvp_fast compiled"),
        Technique("the whole step as one CUDA graph", options={"cuda_graphs": False}, graph=True),
        Technique("less memory: MLP recomputed", options={"recompute": "mlp"}),
        Technique("less memory: blocks recomputed", options={"recompute": "block"}),
    ]
    kept: list[Technique] = []
    for row in rows:
        repeats = any(dataclasses.replace(row, title=other.title) == other for other in kept)
        cpu_only = DEVICE.type != "cpu" and not (row.packed and row.native)
        if not (repeats or cpu_only or (row.graph and DEVICE.type == "cpu")):
            kept.append(row)
    return kept


def main() -> None:
    rows = techniques()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--depth", type=positive, help="keep so many blocks of the backbone only, to try this script")
    parser.add_argument("--batch", type=positive, default=4 if DEVICE.type == "cpu" else 64)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    numbers = range(len(rows))
    parser.add_argument("--rows", nargs="+", type=int, choices=numbers, default=numbers, help="only these of the table")
    parser.add_argument("--save", action="store_true", help="add the rows to the results of this machine")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # in a child process: print JSON
    arguments = parser.parse_args()
    if arguments.save and arguments.depth is not None:
        parser.error("--save --depth: expected the whole backbone in saved results")
    if arguments.one:
        row = rows[arguments.rows[0]]
        with nullcontext() if row.packed else products.override_provider(unpacked):
            print(json.dumps(measure(row, arguments)))
        return
    cut = {} if arguments.depth is None else {"depth": arguments.depth}
    try:
        check_model(arguments.model, **cut)
    except InsVPError as error:
        parser.error(str(error))
    measured = []
    for i in arguments.rows:
        child = [sys.executable, "-m", "benchmarks.waterfall", "--one", "--rows", str(i), "--model", arguments.model]
        child += ["--batch", str(arguments.batch), "--rounds", str(arguments.rounds)]
        child += ["--precision", arguments.precision]
        child += [] if arguments.depth is None else ["--depth", str(arguments.depth)]
        environment = os.environ | ({} if rows[i].native else {"INSVP_FAST_NATIVE": "0"})
        done = subprocess.run(child, env=environment, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{rows[i].title}: failed, see above")
        measured.append(json.loads(done.stdout.splitlines()[-1]))
        print(results.waterfall_table(measured).splitlines()[-1], flush=True)
    print("\n" + results.waterfall_table(measured))
    if arguments.save:
        print(results.save(measured, "waterfall"))


def unpacked(dtype: torch.dtype) -> str:
    """The provider of products with frozen weights that packs nothing."""
    return "plain" if hardware.has_products(dtype) else "widened"


def measure(row: Technique, arguments: argparse.Namespace) -> Row:
    """Time a row in turn with the bare ViT, and compare its values without dropout with float64."""
    name, batch, amp = arguments.model, arguments.batch, AUTOCAST_DTYPES[arguments.precision]
    cut = {} if arguments.depth is None else {"depth": arguments.depth}
    config = CONFIGS[row.config]
    model = make_model(row.provider, name, config, options=row.options, **cut)
    run = training_step(model, batch, amp, **({"capturable": True} if row.graph else {}))
    run = graphed(run) if row.graph else run
    bare = training_step(make_model("bare", name, **cut), batch, amp)
    seconds = alternate({"bare": bare, "row": run}, arguments.rounds)
    result: Row = {"technique": row.title, "job": JOB, "precision": arguments.precision, "model": name, "batch": batch}
    result |= {"config": row.config, "rounds": arguments.rounds, **summarize(seconds["row"], seconds["bare"])}
    result["saved MB per image"] = saved_mb_per_image(row.provider, model, batch, amp)
    if DEVICE.type == "cuda" and not row.graph:  # a graph holds its memory before it runs
        result["peak MB"] = peak_bytes(run, model) / 1e6
    still, few = without_dropout(config), min(batch, 2)
    exact = expected("reference", torch.float64, None, name, few, still, **cut)
    values = forward_backward(make_model(row.provider, name, still, options=row.options, **cut), few, amp)
    values = graphed(values) if row.graph else values
    return result | errors(values(), exact)


if __name__ == "__main__":
    main()
