"""How long the device is idle because the next batch is not there yet."""

from __future__ import annotations

import time
from typing import Any

import torch

__all__ = ["DataTimer"]

MAX_EVENTS = 64  # pairs of events that are kept before those that have passed are added up


class DataTimer:
    """A context manager around loading a batch; ``seconds`` is how long the device was idle in it.

    While the host waits for a batch, a GPU may still be busy with earlier ones. So on a GPU the time is measured by
    events on the device, from the end of that work to the arrival of the batch; reading them does not synchronize.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.reset()

    def reset(self) -> None:
        """Start again from 0."""
        self._seconds, self._events = 0.0, list[tuple[Any, Any]]()

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *_: object) -> None:
        end = self._now()
        if not self.on_gpu:
            self._seconds += end - self._start
            return
        self._events.append((self._start, end))
        if len(self._events) >= MAX_EVENTS:
            self._add_events()

    def seconds(self) -> float:
        """The idle time so far; on a GPU, of the work that is already done."""
        self._add_events()
        return self._seconds

    def _add_events(self) -> None:
        while self._events and self._events[0][1].query():
            start, end = self._events.pop(0)
            self._seconds += start.elapsed_time(end) / 1000  # elapsed_time is in milliseconds

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
