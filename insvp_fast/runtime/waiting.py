"""Calls of the native library that wait for one another: what they compute is prepared first, and computed at once.

A call fills the caches with its tensors, and the Python and PyTorch before the next call then take several times as
long as they would for many calls in a row.

The functions here take a function instead of being context managers: an interrupt in the ``__exit__`` of one would let
calls wait for ever.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from torch import Tensor, UntypedStorage

__all__ = [
    "Group",
    "Recording",
    "are_together",
    "at_once",
    "finish",
    "group",
    "hold",
    "lasting",
    "record",
    "recording",
    "run",
    "together",
]

T = TypeVar("T")


class _Queue:
    """Calls that wait, and the memory that they read and write.

    Not the tensors, as those that were saved for backward know the graph: what waits after an error would keep it.
    """

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.memory: list[UntypedStorage] = []

    def run(self, call: Any) -> None:
        self.calls.append(call)

    def hold(self, x: Tensor) -> None:
        self.memory.append(x.untyped_storage())

    def finish(self) -> None:
        calls, memory = self.calls, self.memory
        self.calls, self.memory = [], []
        for compute in calls:
            compute()
        del memory  # it is held until all have run


class Recording(Protocol):
    """Takes note of calls, which run at once, and of what they read and write (``programs.py``)."""

    def run(self, call: Any) -> None:
        """Run a native call."""

    def hold(self, x: Tensor) -> None:
        """The next call has the address of ``x``."""

    def finish(self) -> None:
        """Something else than native calls reads what they have computed."""

    def lent(self, x: Tensor) -> None:
        """``x`` is new memory, of which nothing is read before it is written."""

    def lasts(self, x: Tensor) -> None:
        """``x`` is there, and the same, as long as what decides over the calls is; its values may change."""

    def rests_on(self, made: Any, use: Any) -> None:
        """The tensors ``made`` are those of ``use``, which tells later whether they still are."""


class Group(threading.local):
    """Nodes of an autograd graph whose calls in backward wait for its ``finish``, in each thread for its own.

    Gradients may leave the nodes only through one that calls ``finish`` (``enter_group`` in ``ops/autograd.py``), and
    nothing else may read them before: PyTorch does not where each goes from one node to one other.
    """

    def __init__(self) -> None:  # in each thread that goes through the graph
        self._queue = _Queue()

    def prepare(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function(*arguments)``, whose calls wait."""
        outside = _thread.queue
        try:
            _thread.queue = self._queue
            return function(*arguments)
        finally:
            _thread.queue = outside

    def finish(self) -> None:
        """Run what waits."""
        self._queue.finish()


class _Thread(threading.local):
    """Where calls of this thread wait, None where they do not, and the group that its nodes belong to."""

    queue: _Queue | Recording | None = None
    group: Group | None = None


_thread = _Thread()


def together(prepare: Callable[[], T], backward: Group | None = None) -> T:
    """``prepare()``, whose calls wait for its end, or for ``finish``; they run in order.

    Until then nothing but such calls may write what they read, or read or write what they compute. The implementations
    of the operations say whether they heed that (``ops/registry.py``); PyTorch's own functions do not. The nodes that
    are made belong to the group ``backward``.
    """
    finish()
    outside = _thread.queue, _thread.group
    try:
        _thread.queue, _thread.group = _Queue(), backward
        prepared = prepare()
        finish()
        return prepared
    finally:
        _thread.queue, _thread.group = outside


def record(recording: Recording, function: Callable[[], T]) -> T:
    """``function()``, of whose calls ``recording`` takes note."""
    finish()
    outside = _thread.queue
    try:
        _thread.queue = recording
        return function()
    finally:
        _thread.queue = outside


def recording() -> Recording | None:
    """What takes note of the calls of this thread."""
    queue = _thread.queue
    return None if queue is None or isinstance(queue, _Queue) else queue


def lasting(*tensors: Tensor | None) -> None:
    """Say of tensors that calls read that they belong to the modules, or never change."""
    if (taking_note := recording()) is not None:
        for x in tensors:
            if x is not None:
                taking_note.lasts(x)


def at_once(function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)`` after what waits, and without waiting."""
    finish()
    outside = _thread.queue
    try:
        _thread.queue = None
        return function(*arguments)
    finally:
        _thread.queue = outside


def are_together() -> bool:
    """Whether calls of this thread would wait."""
    return _thread.queue is not None


def group() -> Group | None:
    """The group that nodes made now belong to."""
    return _thread.group


def finish() -> None:
    """Run what waits."""
    if _thread.queue is not None:
        _thread.queue.finish()


def hold(x: Tensor) -> None:
    """Keep a tensor's memory until the calls that wait have run, the one that is being prepared among them."""
    if _thread.queue is not None:
        _thread.queue.hold(x)


def run(call: Callable[[], None]) -> None:
    """Run a call, or let it wait."""
    if _thread.queue is None:
        call()
    else:
        _thread.queue.run(call)
