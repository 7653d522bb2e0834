"""Training step and inference against the bare frozen timm model: runs alternate in one process, ratios are medians.

The floor ratio is time over that of the needed operations at the best rate of a block's products, timed in the same
rounds: see insvp_fast/bench/floor.py.

python -m benchmarks.paired                   prints the rows
python -m benchmarks.paired --save --tables   also writes benchmarks/results/<machine>.json and the tables in Markdown
"""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn

from benchmarks import models, results
from benchmarks.peers import missing
from insvp_fast.bench.jobs import AUTOCAST_DTYPES, JOBS
from insvp_fast.bench.models import CONFIGS
from insvp_fast.bench.tables import format_products, line
from insvp_fast.bench.timing import compare
from insvp_fast.commands.bench import check_model
from insvp_fast.commands.options import positive
from insvp_fast.errors import InsVPError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16_224")
    parser.add_argument("--depth", type=positive, help="keep so many blocks of the backbone only, to try this script")
    parser.add_argument("--config", choices=CONFIGS, default="paper", help="of InsVP")
    parser.add_argument("--batch", type=positive, nargs="+", default=[8, 1], help="1 is the latency")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--precisions", nargs="+", choices=AUTOCAST_DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=["training step", "inference"])
    parser.add_argument("--providers", nargs="+", choices=models.PROVIDERS, default=["bare", "insvp_fast"])
    parser.add_argument("--save", action="store_true", help="add the rows to the results of this machine")
    parser.add_argument("--tables", action="store_true", help="rewrite the tables in Markdown from all results")
    arguments = parser.parse_args()
    if arguments.providers[0] != "bare":
        parser.error(f"--providers {' '.join(arguments.providers)}: expected `bare` first, since ratios are to it")
    if arguments.config == "paper" and (wrong := set(arguments.providers) & set(models.RELEASE)):
        parser.error(f"--providers {' '.join(sorted(wrong))}: expected --config released with the release")
    if arguments.save and arguments.depth is not None:
        parser.error("--save --depth: expected the whole backbone in saved results")
    cut = {} if arguments.depth is None else {"depth": arguments.depth}
    try:
        check_model(arguments.model, **cut)
    except InsVPError as error:
        parser.error(str(error))

    def make(provider: str, *options: Any, **kwargs: Any) -> nn.Module:
        try:
            return models.make_model(provider, *options, **kwargs)
        except ValueError as error:
            parser.error(f"--model {arguments.model} --config {arguments.config}: {provider} cannot be made: {error}")

    for batch in arguments.batch:
        for precision in arguments.precisions:
            for job in arguments.jobs:
                reasons = {name: missing(name, job, precision) for name in arguments.providers}
                providers = [name for name, reason in reasons.items() if reason is None]
                what = job, precision, providers, arguments.model, batch, arguments.rounds, arguments.config
                rows = compare(*what, make=make, **cut)
                print("\n".join(map(line, rows)), flush=True)
                print("\n".join([*filter(None, reasons.values()), format_products(rows[:1])]), flush=True)
                if arguments.save:
                    results.save(rows)
    if arguments.tables:
        results.write_tables()


if __name__ == "__main__":
    main()
