"""fingerprint in C++: checksums of memory, and a look whether it still has them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from insvp_fast.runtime.native.library import call, i32, i64, ptr

__all__ = ["LINES", "Checksums", "Look"]

LINES = 128  # cache lines of a block of 8 KB

_FILL = [ptr, i64, ptr]
_SAME = [ptr, i64, ptr]
_ROW = 4  # numbers of a row of the C struct Region


class Checksums:
    """Of each of the pieces of memory (address, bytes), one for line 0 of all blocks, one for line 1, and so on.

    The memory has to be there whenever they are asked. Raises RuntimeError where the library is not in use.
    """

    def __init__(self, pieces: Sequence[tuple[int, int]]) -> None:
        self._pieces, self._sums = pieces, [(ctypes.c_uint64 * LINES)() for _ in pieces]
        for piece, sums in zip(pieces, self._sums, strict=True):
            call("fingerprint", _FILL, *piece, ctypes.addressof(sums))

    @property
    def rows(self) -> list[tuple[int, ...]]:
        return [(*piece, ctypes.addressof(s), 0) for piece, s in zip(self._pieces, self._sums, strict=True)]


class Look:
    """A look at several ``Checksums`` at once."""

    def __init__(self, several: Sequence[Checksums]) -> None:
        self._several = several  # the table has addresses in them
        rows = [row for one in several for row in one.rows]
        self._counts, self._num_rows = [len(one.rows) for one in several], len(rows)
        self._table = (i64 * (_ROW * len(rows)))(*(number for row in rows for number in row))

    def hold(self, lines: Sequence[int]) -> bool:
        """Whether the memory of each has its old checksum of one line, or, up to 64 KB, of all."""
        table, same = type(self._table).from_buffer_copy(self._table), i32()  # of this thread alone
        table[_ROW - 1 :: _ROW] = [line for line, n in zip(lines, self._counts, strict=True) for _ in range(n)]
        call("fingerprint_same", _SAME, ctypes.addressof(table), self._num_rows, ctypes.addressof(same))
        return bool(same.value)
