"""Time InsVPViT in two checkouts: processes of both in turns, and the medians of the ratios of neighbors.

    python -m tools.speed ../before .     # both need their native library

Only names that both checkouts have may be used in ``CHILD``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

CHILD = """
import json, statistics, sys, time, warnings
import torch
from insvp_fast import InsVPViT
from insvp_fast.runtime import native
if not native.native_status():
    sys.exit(f"{native.__path__[0]}: {native.native_status()}")
warnings.simplefilter("ignore")
name, (batch, depth, rounds) = sys.argv[1], map(int, sys.argv[2:])
torch.manual_seed(0)
model = InsVPViT(name, 200, depth=depth)
size = model.backbone.patch_embed.img_size
image, target = torch.randn(batch, 3, *size), torch.randint(0, 200, (batch,))
found = {}
for job in ("inference", "training"):
    model.train(job == "training")
    for amp in (None, torch.bfloat16):
        seconds = []
        for _ in range(rounds + 1):
            start = time.perf_counter()
            with torch.set_grad_enabled(job == "training"), torch.autocast("cpu", amp, enabled=amp is not None):
                logits = model(image)
            if job == "training":
                torch.nn.functional.cross_entropy(logits.float(), target).backward()
                model.zero_grad()
            seconds.append(time.perf_counter() - start)
        found[f"{job} {'bf16' if amp else 'fp32'}"] = statistics.median(seconds[1:])
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each job in a process")
    parser.add_argument("--pairs", type=int, default=5, help="processes of each checkout")
    options = parser.parse_args()
    arguments = [options.model, *map(str, (options.batch, options.depth, options.rounds))]
    ratios: dict[str, list[float]] = {}
    for pair in range(options.pairs):
        step = 1 if pair % 2 else -1  # who begins; both run, also if they are the same checkout, which shows the noise
        before, after = [seconds(tree, arguments) for tree in (options.before, options.after)[::step]][::step]
        for job in before:
            ratios.setdefault(job, []).append(after[job] / before[job])
    for job, values in ratios.items():
        print(f"{job}: after/before {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})")


def seconds(tree: Path, arguments: list[str]) -> dict[str, float]:
    """What one process of a checkout takes for each job."""
    environment = os.environ | {"PYTHONPATH": str(tree.resolve())}
    command = [sys.executable, "-c", CHILD, *arguments]
    done = subprocess.run(command, env=environment, cwd=tree, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
