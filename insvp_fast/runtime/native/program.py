"""program in C++: native calls, one after another, on memory whose places are given for each run."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

from insvp_fast.runtime.native.library import Call, call, f32, function, i64, ptr

__all__ = ["Place", "Steps"]

_PROGRAM = [ptr, i64, ptr, i64, ptr, i64, ptr]


class Place(NamedTuple):
    """Where an argument of a call points to."""

    argument: int
    piece: int  # of memory
    offset: int  # bytes


class Steps:
    """Native calls that were made by ``launch``, with the places of the memory that they get.

    Raises RuntimeError where the library is not in use.
    """

    def __init__(self, calls: Sequence[tuple[Call, Sequence[Place]]]) -> None:
        steps: list[int] = []
        slots: list[int] = []
        places: list[int] = []
        for one, own in calls:
            step = function(f"{one.name}_step", [ptr], threads=True)
            steps += ctypes.cast(step, ptr).value or 0, len(slots)
            for place in own:
                places += len(slots) + place.argument, place.piece, place.offset
            slots += [_slot(value, kind) for value, kind in zip(one.args, one.argtypes, strict=True)]
        self._tables = [(i64 * len(numbers))(*numbers) for numbers in (steps, slots, places)]
        self._count = len(calls)
        counts = len(calls), len(slots), len(places) // 3
        self._arguments = [
            x for table, n in zip(self._tables, counts, strict=True) for x in (ctypes.addressof(table), n)
        ]

    def __len__(self) -> int:
        return self._count

    def run(self, starts: Sequence[int]) -> None:
        """Run the calls where the pieces of memory begin at these addresses.

        Raises MemoryError where there is no memory for a workspace.
        """
        table = (i64 * len(starts))(*starts)
        call("program", _PROGRAM, *self._arguments, ctypes.addressof(table))


def _slot(value: int | float | None, argtype: type) -> int:
    """The 64 bits of an argument; a null pointer is None."""
    number = value or 0
    return ctypes.c_uint32.from_buffer(f32(number)).value if argtype is f32 else int(number)
