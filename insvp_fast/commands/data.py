"""List the data sets that are known by name, or check that one is complete: images of each split, classes, damage."""

from __future__ import annotations

import argparse
from typing import Any

from insvp_fast.errors import CommandError

SUMMARY = "list the known data sets, or check one on disk"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    every = actions.add_parser("list", help="names, classes, and where each comes from")
    every.set_defaults(action=_list)
    check = actions.add_parser("check", help="read every image of a data set and count")
    check.set_defaults(action=_check)
    check.add_argument("name", metavar="NAME|PATH", help="as in `insvp data list`, or a folder or list file")
    check.add_argument("--root", metavar="FOLDER", help="where a named data set is")


def run(action: Any, **options: Any) -> int:
    return action(**options)


def _list() -> int:
    from insvp_fast.data.sets import SETS

    for name, known in SETS.items():
        print(f"{name:26} {known.classes:4} classes, {sum(known.counts.values()):7,} images  {known.origin}")
    print(
        "Besides: digits, which comes with scikit-learn; any folder with train and val or test, one folder per class;"
    )
    print("lists of `path label` lines; and timm's readers hfds/..., wds/... and tfds/....")
    return 0


def _check(name: str, root: str | None) -> int:
    from insvp_fast.data import check

    report = check(name, root)
    print(report)
    if not report.ok:
        raise CommandError(f"{name}: not every image can be read")
    return 0
