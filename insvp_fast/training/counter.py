"""The progress of evaluation and prediction."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Self

from insvp_fast.training.terminal import Bar

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
        self.bar = Bar(name, total, done, not silent)

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.__exit__()

    def add(self, images: int) -> None:
        """Count images that are done now, one or more."""
        self.done += images
        now = time.perf_counter()
        speed = (self.done - self.before) / (now - self.start)
        text = f"{self.done:,} of {self.total:,} images, {speed:,.0f} images/s"
        if self.bar.shown:
            remaining = timedelta(seconds=round((self.total - self.done) / speed))
            self.bar.show(f"[cyan]{str(remaining).removeprefix('0:')} left[/]  {text}")
        elif not self.silent and now - self.last_line > SECONDS_PER_LINE:
            self.last_line = now
            print(f"insvp: {self.name}: {text}", file=sys.stderr, flush=True)
        self.bar.advance(images)
