"""What each technique brings: one row each, from the authors' arithmetic down to InsVPViT with everything on.

python -m benchmarks.waterfall --precision fp32 --batch 4

Each row is a process of its own, since the native library is chosen when it is first asked for, and in each the bare
timm ViT runs in turns with the row's model: ratios to it can be compared, even where the machine does other things.
The errors, of the logits and of the worst gradient, are relative to float64, without dropout.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from typing import Any

import torch

from benchmarks import results, steps
from insvp_fast import InsVPViT, bench
from insvp_fast.runtime import hardware, products

JOB = "training step"


@dataclasses.dataclass(frozen=True)
class Technique:
    title: str
    provider: str = "insvp_fast"
    config: str = "paper"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of InsVPViT
    packed: bool = True  # frozen weights, for this CPU; else PyTorch multiplies as it does by any weight
    native: bool = True
    graph: bool = False


def techniques() -> list[Technique]:
    """The rows, in order; those that need a GPU, or a switch that this version of InsVPViT lacks, are left out."""
    off = {"attention": "sdpa", "compile_prompters": False, "fold_norm": False, "recompute": "none"}
    rows = [
        Technique("release, as released", "released", "released"),
        Technique("release, backbone frozen", "released frozen", "released"),
        Technique("specific prompter once", "reference", "released"),
        Technique("the paper's prompters", "reference"),
        Technique("exact savings", options=off, packed=False, native=False),
        Technique("+ frozen weights packed", options=off, native=False),
        Technique("+ native library", options=off),
        Technique("+ attention of its own", options=off | {"attention": "auto"}),
        Technique("+ norms folded", options={"fold_norm": True, "compile_prompters": False}),
        Technique("+ defaults of InsVPViT"),
        Technique("+ compiled", "insvp_fast compiled"),
        Technique("+ CUDA graph, not compiled", graph=True),
        Technique("less memory: MLP recomputed", options={"recompute": "mlp"}),
        Technique("less memory: blocks recomputed", options={"recompute": "block"}),
    ]
    known = inspect.signature(InsVPViT.__init__).parameters
    kept: list[Technique] = []
    for row in rows:
        row = dataclasses.replace(row, options={key: value for key, value in row.options.items() if key in known})
        repeats = any(dataclasses.replace(row, title=other.title) == other for other in kept)
        cpu_only = bench.DEVICE.type != "cpu" and not (row.packed and row.native)
        if not (repeats or cpu_only or (row.graph and bench.DEVICE.type == "cpu")):
            kept.append(row)
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--depth", type=int, help="cut the backbone to so many blocks, to try this script")
    parser.add_argument("--batch", type=int, default=4 if bench.DEVICE.type == "cpu" else 64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--rows", nargs="+", type=int, help="only these, counted from 0")
    parser.add_argument("--save", action="store_true", help="add the rows to the results of this machine")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # the child: the row as JSON
    arguments = parser.parse_args()
    rows = techniques()
    chosen = range(len(rows)) if arguments.rows is None else arguments.rows
    if arguments.one:
        print(json.dumps(measure(rows[chosen[0]], arguments)))
        return
    measured = []
    for i in chosen:
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


def measure(row: Technique, arguments: argparse.Namespace) -> bench.Row:
    """Time a row in turns with the bare ViT, and compare its values without dropout with float64."""
    if not row.packed:
        plain = products.override_provider(lambda dtype: "plain" if hardware.has_products(dtype) else "widened")
        plain.__enter__()  # until this process ends
    name, batch, amp = arguments.model, arguments.batch, bench.AMP[arguments.precision]
    cut = {} if arguments.depth is None else {"depth": arguments.depth}
    config = bench.CONFIGS[row.config]
    model = steps.make_model(row.provider, name, config, row.options, **cut)
    run = bench.training_step(model, batch, amp, **({"capturable": True} if row.graph else {}))
    run = steps.graphed(run) if row.graph else run
    bare = bench.training_step(bench.make_model("bare", name, **cut), batch, amp)
    seconds = bench.alternate({"bare": bare, "row": run}, arguments.rounds)
    ratio, p20, p80 = bench.spread([mine / its for mine, its in zip(seconds["row"], seconds["bare"], strict=True)])
    image, _ = bench.make_images(model, batch)
    result = {"technique": row.title, "job": JOB, "precision": arguments.precision, "model": name, "batch": batch}
    result |= {"config": row.config, "rounds": arguments.rounds, "seconds": bench.spread(seconds["row"])[0]}
    result |= {"ratio": ratio, "ratio p20": p20, "ratio p80": p80}
    result["saved MB per image"] = bench.saved_bytes(model, image, amp) / batch / 1e6
    if bench.DEVICE.type == "cuda":
        result["peak MB"] = bench.peak_bytes(run) / 1e6
    still, few = steps.without_dropout(config), min(batch, 2)
    exact = steps.expected("reference", torch.float64, None, name, few, still, **cut)
    values = bench.forward_backward(steps.make_model(row.provider, name, still, row.options, **cut), few, amp)
    values = steps.graphed(values) if row.graph else values
    found = {steps.to_ours(key): value for key, value in values().items()}
    return result | steps.errors(found, exact)


if __name__ == "__main__":
    main()
