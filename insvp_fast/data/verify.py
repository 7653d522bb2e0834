"""Checking a data set: open every image, and compare the counts with the table of named sets."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from insvp_fast.data.images import Images
from insvp_fast.data.sets import SETS
from insvp_fast.data.sources import read_source
from insvp_fast.errors import DataError

__all__ = ["Report", "check"]


class Report(NamedTuple):
    """What ``check`` found; ``str(report)`` is for people."""

    name: str
    counts: dict[str, int]  # images of each split
    classes: int
    unreadable: list[str]  # a message for each image that cannot be opened
    differences: list[str]  # from the table; empty for a data set that is not in it

    @property
    def ok(self) -> bool:
        """Whether every image can be opened; differences from the table do not count."""
        return not self.unreadable

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.classes} classes"]
        lines += [f"  {split}: {count} images" for split, count in self.counts.items()]
        lines += [f"  differs from the official set: {difference}" for difference in self.differences]
        lines += [f"  unreadable: {message}" for message in self.unreadable]
        lines += ["  every image can be opened"] if self.ok else []
        return "\n".join(lines)


def check(name: str, root: str | None = None) -> Report:
    """Open every image of a data set; ``name`` and ``root`` as in ``load_data``.

    Raises:
        DataError: if the data set cannot be read at all.
    """
    found = read_source(name, root=root)
    counts = {split: len(images) for split, images in found.splits.items()}
    unreadable = [message for images in found.splits.values() for message in _unreadable(images)]
    return Report(name, counts, len(found.class_names), unreadable, _differences(name, counts, len(found.class_names)))


def _unreadable(images: Images) -> list[str]:
    def message(index: int) -> str | None:
        try:
            images.decode(index)
        except DataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return [text for text in threads.map(message, range(len(images))) if text is not None]


def _differences(name: str, counts: dict[str, int], classes: int) -> list[str]:
    if name not in SETS:
        return []
    known = SETS[name]
    expected = {"classes": known.classes} | known.counts
    found = {"classes": classes} | counts
    if "val" in counts and "val" not in expected:  # lists that divide the official training split
        found["train"] += found.pop("val")
    return [f"{what}: {found[what]}, expected {number}" for what, number in expected.items() if found[what] != number]
