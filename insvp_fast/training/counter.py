"""The progress of evaluation and prediction."""

from __future__ import annotations

import sys
import time
from typing import Self

from tqdm import tqdm

__all__ = ["Counter"]

SECONDS_PER_LINE = 60.0  # where standard error is not a terminal


class Counter:
    """Shows on standard error how many images are done: a bar on a terminal, elsewhere a line a minute.

    Args:
        name: what is running.
        total, done: numbers of images: of all, and of those done before.
        silent: whether nothing is shown.
    """

    def __init__(self, name: str, total: int, done: int = 0, silent: bool = False) -> None:
        self.name, self.total, self.before, self.done, self.silent = name, total, done, done, silent
        self.start = self.last_line = time.perf_counter()
        disable = True if silent else None  # None: unless it is a terminal
        self.bar = tqdm(total=total, initial=done, desc=name, unit=" images", leave=False, disable=disable)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, images: int) -> None:
        """Count images that are done now."""
        self.done += images
        self.bar.update(images)
        now = time.perf_counter()
        if self.bar.disable and not self.silent and now - self.last_line > SECONDS_PER_LINE:
            self.last_line = now
            speed = (self.done - self.before) / (now - self.start)
            text = f"{self.name}: {self.done:,} of {self.total:,} images, {speed:,.0f} images/s"
            print(f"insvp: {text}", file=sys.stderr, flush=True)
