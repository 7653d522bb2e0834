"""Training step and inference against the bare frozen timm ViT: alternating runs in one process, medians, ratios.

python benchmarks/paired.py                   prints a table
python benchmarks/paired.py --save --readme   also writes benchmarks/results/<machine>.json and the README's table
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import steps  # noqa: E402  # found beside this file, whoever starts it
from insvp_fast import bench  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--depth", type=int, help="cut the backbone to so many blocks, to try this script")
    parser.add_argument("--config", choices=bench.CONFIGS, default="paper", help="of InsVP; the release is the second")
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precisions", nargs="+", choices=bench.AMP, default=["fp32", "bf16"])
    parser.add_argument("--jobs", nargs="+", choices=bench.JOBS, default=["training step", "inference"])
    parser.add_argument("--providers", nargs="+", choices=steps.PROVIDERS, default=["bare", "insvp_fast"])
    parser.add_argument("--save", action="store_true", help="add the rows to the results of this machine")
    parser.add_argument("--readme", action="store_true", help="rewrite the README's table from all saved results")
    arguments = parser.parse_args()
    if arguments.providers[0] != "bare":
        parser.error(f"--providers {' '.join(arguments.providers)}: expected bare first, ratios are to it")
    if arguments.config == "paper" and (wrong := set(arguments.providers) & set(steps.RELEASE)):
        parser.error(f"--providers {' '.join(sorted(wrong))}: the release's arithmetic wants --config released")
    if arguments.save and arguments.depth is not None:
        parser.error("--save --depth: expected a whole backbone")
    cut = {} if arguments.depth is None else {"depth": arguments.depth}
    for batch in arguments.batch:
        for precision in arguments.precisions:
            for job in arguments.jobs:
                rows = bench.compare(
                    job,
                    precision,
                    arguments.providers,
                    arguments.model,
                    batch,
                    arguments.rounds,
                    arguments.config,
                    steps.make_model,
                    **cut,
                )
                print("\n".join(map(bench.line, rows)), flush=True)
                if arguments.save:
                    save(rows)
    if arguments.readme:
        write_readme()


def save(rows: list[bench.Row], folder: Path = HERE / "results") -> Path:
    """Merge rows into the file of this machine; a row replaces an older one of the same job."""
    facts = bench.machine()
    name = re.sub(r"[^A-Za-z0-9]+", "-", facts["device"]).strip("-").lower()
    path = folder / f"{name}-torch{facts['torch']}.json"
    path.parent.mkdir(exist_ok=True)
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    keys = ("job", "precision", "provider", "model", "batch")
    merged = {(*(row[key] for key in keys), row.get("config", "paper")): row for row in old + rows}
    path.write_text(json.dumps({"machine": facts, "rows": list(merged.values())}, indent=1) + "\n")
    return path


def write_readme(folder: Path = HERE / "results", readme: Path = HERE.parent / "README.md") -> None:
    """Put a table of all saved results between the README's markers."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        facts = result["machine"]
        # what was timed together stands together, the bare ViT first
        groups: dict[tuple[object, ...], list[bench.Row]] = {}
        for row in result["rows"]:
            key = row["model"], row.get("config", "paper"), row["job"], row["precision"], row["batch"]
            groups.setdefault(key, []).append(row)
        rows = [row for group in groups.values() for row in sorted(group, key=rank)]
        parts.append(f"{facts['device']}, torch {facts['torch']}:\n\n{bench.table(rows)}\n")
    before, rest = readme.read_text().split("<!-- results -->\n", 1)
    _, after = rest.split("<!-- end of results -->", 1)
    readme.write_text(f"{before}<!-- results -->\n" + "\n".join(parts) + f"<!-- end of results -->{after}")


def rank(row: bench.Row) -> int:
    order = ("bare", "released", "authors", "reference", "insvp_fast")
    return order.index(row["provider"].split(" ")[0])


if __name__ == "__main__":
    main()
