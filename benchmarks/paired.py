"""Training step and inference against the bare frozen timm ViT: alternating runs in one process, medians, ratios.

python -m benchmarks.paired                   prints a table
python -m benchmarks.paired --save --readme   also writes benchmarks/results/<machine>.json and the README's table
"""

from __future__ import annotations

import argparse

from benchmarks import results, steps
from insvp_fast import bench


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
                    results.save(rows)
    if arguments.readme:
        results.write_readme()


if __name__ == "__main__":
    main()
