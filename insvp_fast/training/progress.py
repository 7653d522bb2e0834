"""The progress of an epoch: a bar or lines while it runs, and its speed."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Self

from insvp_fast.training.loader import Loader
from insvp_fast.training.run_folder import SLOW_LOADER
from insvp_fast.training.run_logger import RunLogger
from insvp_fast.training.terminal import Bar

__all__ = ["Progress"]

SECONDS_PER_LINE = 60.0  # where the output is not a terminal


class Progress:
    """A progress bar on a terminal, occasional lines elsewhere: loss, images/s, time spent waiting, time left.

    Args:
        name: what is running.
        loader: of the batches, set to the epoch and batch that it begins with.
        epochs: of the whole training, for the time left.
    """

    def __init__(self, logger: RunLogger, name: str, loader: Loader, epochs: int) -> None:
        self.logger, self.name, self.loader = logger, name, loader
        first, self.batches = loader.sampler.first_batch, len(loader)
        self.batches_left = (epochs - loader.sampler.epoch) * self.batches - first
        self.done, self.images = 0, 0
        loader.timer.reset()
        self.start = self.last_line = time.perf_counter()
        self.bar = Bar(name, self.batches, first, logger.active)

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.__exit__()

    def count(self, images: int) -> None:
        """Count a batch, which had this number of images in all processes together."""
        self.images += images
        self.done += 1
        self.bar.advance()

    def show(self, loss: float) -> None:
        """Update the bar, or print a line. For true times, the device must have finished its work."""
        now, speed = time.perf_counter(), self.speed()
        remaining = timedelta(seconds=round((now - self.start) / self.done * (self.batches_left - self.done)))
        images_per_s, wait = f"{speed['images_per_s']:.0f} images/s", f"waiting {speed['data_wait']:.0%}"
        text = f"loss {loss:.3f}  {images_per_s}  {wait}  {remaining} left"
        if self.bar.shown:
            wait = f"[yellow]{wait}[/]" if speed["data_wait"] > SLOW_LOADER else wait
            left = f"[cyan]{str(remaining).removeprefix('0:')} left[/]"
            facts = [left, f"loss {loss:.3f}", self.logger.scores(), images_per_s, wait]
            self.bar.show("  ".join(filter(None, facts)))
        elif now - self.last_line > SECONDS_PER_LINE:
            self.last_line = now
            fraction = (self.loader.sampler.first_batch + self.done) / self.batches
            self.logger.say(f"{self.name}  {fraction:4.0%}  {text}")

    def speed(self) -> dict[str, float]:
        """Images per second in all processes together, and the fraction of the time spent waiting for images."""
        seconds = time.perf_counter() - self.start
        return {"images_per_s": self.images / seconds, "data_wait": self.loader.timer.seconds() / seconds}
