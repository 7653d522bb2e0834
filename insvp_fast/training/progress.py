"""The progress of an epoch: a bar or lines while it runs, and its speed."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Self

from tqdm import tqdm

from insvp_fast.training.loader import Loader
from insvp_fast.training.run_logger import RunLogger

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
        disable = None if logger.active else True  # None: unless the output is a terminal
        layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
        self.bar = tqdm(total=self.batches, initial=first, desc=name, leave=False, disable=disable, bar_format=layout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def count(self, images: int) -> None:
        """Count a batch, which had this number of images in all processes together."""
        self.images += images
        self.done += 1
        self.bar.update()

    def show(self, loss: float) -> None:
        """Update the bar, or print a line. For true times, the device must have finished its work."""
        now, speed = time.perf_counter(), self.speed()
        remaining = timedelta(seconds=round((now - self.start) / self.done * (self.batches_left - self.done)))
        text = (
            f"loss {loss:.3f}  {speed['images_per_s']:.0f} images/s  waiting {speed['data_wait']:.0%}  {remaining} left"
        )
        self.bar.set_postfix_str(text)
        if self.bar.disable and now - self.last_line > SECONDS_PER_LINE:
            self.last_line = now
            fraction = (self.loader.sampler.first_batch + self.done) / self.batches
            self.logger.say(f"{self.name}  {fraction:4.0%}  {text}")

    def speed(self) -> dict[str, float]:
        """Images per second in all processes together, and the fraction of the time spent waiting for images."""
        seconds = time.perf_counter() - self.start
        return {"images_per_s": self.images / seconds, "data_wait": self.loader.timer.seconds() / seconds}
