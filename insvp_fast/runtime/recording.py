"""What takes note of the native calls of a thread, and of the memory that they read and write (``programs.py``).

Everything between a tensor and a native call tells here what it does: memory that is new, packed weights, the tensors
whose addresses a call gets, and the call itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["Recording", "current", "hold", "interrupt", "lasting", "record", "run"]

T = TypeVar("T")


class Recording:
    """Takes note; this class, of nothing."""

    def new(self, x: Tensor) -> None:
        """``x`` is new memory, of which nothing is read before it is written."""

    def packed(self, made: Sequence[Tensor | None], use: Any) -> None:
        """Made of weights, for a ``prepack.Use``."""

    def lasts(self, x: Tensor) -> None:
        """``x`` is there as long as what decides over the calls is the same; its values may change."""

    def hold(self, x: Tensor) -> None:
        """The next call gets an address in the memory of ``x``."""

    def run(self, call: Any) -> None:
        """Run a native call."""
        call()

    def interrupt(self) -> None:
        """Something else than a native call is going to read or write what these do, or decides by values."""


class _Thread(threading.local):
    recording: Recording | None = None


_thread = _Thread()


def current() -> Recording | None:
    """What takes note of this thread."""
    return _thread.recording


def record(recording: Recording, function: Callable[[], T]) -> T:
    """``function()``, of which ``recording`` takes note."""
    outside = _thread.recording
    try:
        _thread.recording = recording
        return function()
    finally:
        _thread.recording = outside


def hold(x: Tensor) -> None:
    """See ``Recording.hold``."""
    if _thread.recording is not None:
        _thread.recording.hold(x)


def run(call: Callable[[], None]) -> None:
    """Run a native call."""
    if _thread.recording is None:
        call()
    else:
        _thread.recording.run(call)


def lasting(*tensors: Tensor | None) -> None:
    """Say of tensors that calls read that they belong to the modules, or never change."""
    if _thread.recording is not None:
        for x in tensors:
            if x is not None:
                _thread.recording.lasts(x)


def interrupt() -> None:
    """See ``Recording.interrupt``."""
    if _thread.recording is not None:
        _thread.recording.interrupt()
