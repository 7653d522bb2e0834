"""How long the device had nothing to do because the next images were not there."""

from __future__ import annotations

import time
from typing import Any

import torch

__all__ = ["Waiting"]

FOLDED = 64  # pairs of events that are kept before those that have passed are added up


class Waiting:
    """A context around taking the next batch, and the ``seconds`` that the device was idle in it.

    A GPU works through what it was given before, while the host already asks for more: what counts there is the time
    between the end of that work and the arrival of the images, told by events on the device, read without waiting.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Begin again from 0."""
        self._seconds, self._events = 0.0, list[tuple[Any, Any]]()

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_: object) -> None:
        end = self._now()
        if not self.on_gpu:
            self._seconds += end - self._start
            return
        self._events.append((self._start, end))
        if len(self._events) >= FOLDED:
            self._fold()

    def seconds(self) -> float:
        """So far, as far as the device has come."""
        self._fold()
        return self._seconds

    def _fold(self) -> None:
        while self._events and self._events[0][1].query():
            start, end = self._events.pop(0)
            self._seconds += start.elapsed_time(end) / 1000  # it counts milliseconds

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
