"""The speed of an epoch, while it runs and afterwards."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Self

from tqdm import tqdm

from insvp_fast.training.journal import Journal
from insvp_fast.training.order import Loader

__all__ = ["Meter"]

LINE_EVERY = 60.0  # seconds between two lines where there is no terminal for a bar


class Meter:
    """A bar in a terminal, and a line now and then elsewhere: images/s, waiting for data, remaining time.

    Args:
        name: what is running.
        loader: what the batches come from, at the place where it begins.
        epochs: of the whole training, to the end of which the remaining time counts.
    """

    def __init__(self, journal: Journal, name: str, loader: Loader, epochs: int) -> None:
        self.journal, self.name, self.loader = journal, name, loader
        first, self.batches = loader.order.first, len(loader)
        self.left = epochs * self.batches - loader.order.epoch * self.batches - first
        self.done, self.images = 0, 0
        loader.waiting.reset()
        self.start = self.last_line = time.perf_counter()
        disable = None if journal.active else True  # None: unless the output is a terminal
        layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
        self.bar = tqdm(total=self.batches, initial=first, desc=name, leave=False, disable=disable, bar_format=layout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def count(self, images: int) -> None:
        """One more batch was given to the device, with so many images in all processes."""
        self.images += images
        self.done += 1
        self.bar.update()

    def show(self, loss: float) -> None:
        """Tell how it goes; the device has come as far as the host."""
        now, speed = time.perf_counter(), self.speed()
        remaining = timedelta(seconds=round((now - self.start) / self.done * (self.left - self.done)))
        text = (
            f"loss {loss:.3f}  {speed['images_per_s']:.0f} images/s  waiting {speed['data_wait']:.0%}  {remaining} left"
        )
        self.bar.set_postfix_str(text)
        if self.bar.disable and now - self.last_line > LINE_EVERY:
            self.last_line = now
            self.journal.say(f"{self.name}  {(self.loader.order.first + self.done) / self.batches:4.0%}  {text}")

    def speed(self) -> dict[str, float]:
        """Images per second on all devices together, and the part of the time spent waiting for them."""
        seconds = time.perf_counter() - self.start
        return {"images_per_s": self.images / seconds, "data_wait": self.loader.waiting.seconds() / seconds}
