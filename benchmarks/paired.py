"""Training step and inference against the bare frozen timm ViT: alternating runs in one process, medians, ratios.

python benchmarks/paired.py                   prints a table
python benchmarks/paired.py --save --readme   also writes benchmarks/results/<machine>.json and the README's table
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import steps  # noqa: E402  # found beside this file, whoever starts it
from insvp_fast.testing import saved_bytes  # noqa: E402

AMP = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precisions", nargs="+", choices=AMP, default=["fp32", "bf16"])
    parser.add_argument("--providers", nargs="+", choices=steps.PROVIDERS, default=["bare", "insvp_fast"])
    parser.add_argument("--save", action="store_true", help="add the rows to the results of this machine")
    parser.add_argument("--readme", action="store_true", help="rewrite the README's table from all saved results")
    arguments = parser.parse_args()
    if arguments.providers[0] != "bare":
        parser.error(f"--providers {' '.join(arguments.providers)}: expected bare first, ratios are to it")
    rows = []
    for precision in arguments.precisions:
        for job in (steps.training_step, steps.inference):
            rows += measure(job, precision, arguments)
    if arguments.save:
        save(rows)
    if arguments.readme:
        write_readme()


def measure(job: Callable[..., Any], precision: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time every provider round after round, so that whatever else the machine does falls on all of them."""
    models = {provider: steps.make_model(provider, arguments.model) for provider in arguments.providers}
    runs = {provider: job(model, arguments.batch, AMP[precision]) for provider, model in models.items()}
    seconds: dict[str, list[float]] = {provider: [] for provider in runs}
    for round_ in range(arguments.rounds + 1):
        for provider, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:  # the first is warm-up
                seconds[provider].append(time.perf_counter() - start)
    rows = []
    for provider, model in models.items():
        median = statistics.median(seconds[provider])
        pairs = [mine / bare for mine, bare in zip(seconds[provider], seconds[arguments.providers[0]], strict=True)]
        row = {
            "job": job.__name__.replace("_", " "),
            "precision": precision,
            "provider": provider,
            "model": arguments.model,
            "batch": arguments.batch,
            "rounds": arguments.rounds,
            "seconds": median,
            "images per second": arguments.batch / median,
            "ratio": statistics.median(pairs),
        }
        if job is steps.training_step:
            image, _ = steps.make_images(model, 1)
            image.requires_grad_(provider == "bare")
            row["saved MB per image"] = saved_bytes(model, image, AMP[precision]) / 1e6
        rows.append(row)
        print(
            f"{row['job']:14} {precision:5} {provider:11} batch {arguments.batch}: {median:8.3f} s, "
            f"{row['images per second']:7.2f} images/s, ratio {row['ratio']:.3f}"
            + (f", saved {row['saved MB per image']:.1f} MB/image" if "saved MB per image" in row else ""),
            flush=True,
        )
    return rows


def save(rows: list[dict[str, Any]]) -> None:
    """Merge rows into the file of this machine; a row replaces an older one of the same job."""
    facts = steps.machine()
    name = re.sub(r"[^A-Za-z0-9]+", "-", facts["device"]).strip("-").lower()
    path = HERE / "results" / f"{name}-torch{facts['torch']}.json"
    path.parent.mkdir(exist_ok=True)
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    keys = ("job", "precision", "provider", "model", "batch")
    merged = {tuple(row[key] for key in keys): row for row in old + rows}
    path.write_text(json.dumps({"machine": facts, "rows": list(merged.values())}, indent=1) + "\n")
    print(f"saved to {path}")


def write_readme() -> None:
    """Put a table of all saved results between the README's markers."""
    lines = []
    for path in sorted((HERE / "results").glob("*.json")):
        result = json.loads(path.read_text())
        machine = result["machine"]
        lines += [
            f"{machine['device']} ({machine.get('instructions', machine.get('cuda'))}), torch {machine['torch']}:",
            "",
        ]
        lines += [
            "| job | precision | batch | bare timm ViT | InsVPViT | ratio | saved for backward, per image |",
            "|---|---|---|---|---|---|---|",
        ]
        cells = {(r["job"], r["precision"], r["model"], r["batch"], r["provider"]): r for r in result["rows"]}
        for (job, precision, model, batch, provider), mine in cells.items():
            bare = cells.get((job, precision, model, batch, "bare"))
            if provider != "insvp_fast" or bare is None:
                continue
            saved = (
                f"{mine['saved MB per image']:.0f} MB (bare {bare['saved MB per image']:.0f})"
                if "saved MB per image" in mine
                else ""
            )
            times = " | ".join(f"{r['images per second']:.2f} images/s" for r in (bare, mine))
            lines.append(f"| {model}, {job} | {precision} | {batch} | {times} | **{mine['ratio']:.2f}** | {saved} |")
        lines.append("")
    readme = HERE.parent / "README.md"
    before, rest = readme.read_text().split("<!-- results -->\n", 1)
    _, after = rest.split("<!-- end of results -->", 1)
    readme.write_text(f"{before}<!-- results -->\n" + "\n".join(lines) + f"<!-- end of results -->{after}")


if __name__ == "__main__":
    main()
