"""List the named data sets, or check one on disk: images of each split, classes, unreadable files."""

from __future__ import annotations

import argparse
from typing import Any

from insvp_fast.commands.options import add_json
from insvp_fast.data.sets import SETS
from insvp_fast.errors import DataError

SUMMARY = "list the named data sets, or check one on disk"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    every = actions.add_parser("list", help="list names, numbers of classes and images, and where to get the data")
    every.set_defaults(action=_list)
    add_json(every)
    check = actions.add_parser("check", help="read and count all images of a data set")
    check.set_defaults(action=_check)
    check.add_argument("name", metavar="NAME|PATH", help="a name from `insvp data list`, a folder or a list file")
    check.add_argument("--root", metavar="FOLDER", help="folder of a named data set, or of a list's images")
    add_json(check)


def run(action: Any, **options: Any) -> dict[str, Any]:
    return action(**options)


def _list() -> dict[str, Any]:
    for name, known in SETS.items():
        print(f"{name:26} {known.classes:4} classes, {sum(known.counts.values()):7,} images  {known.origin}")
    print("Also: digits, which comes with scikit-learn; folders of images per class, in train, val and test or alone;")
    print("lists of `path label` lines, CSV and tab-separated tables; and hfds/..., wds/... and tfds/....")
    return {name: known._asdict() for name, known in SETS.items()}


def _check(name: str, root: str | None) -> dict[str, Any]:
    from insvp_fast.data import check

    try:
        report = check(name, root)
    except DataError as error:
        raise DataError(str(error).removeprefix("`data` is ")) from error
    print(report)
    return report._asdict() | {"errors": [] if report.ok else [f"{name}: some images cannot be read"]}
