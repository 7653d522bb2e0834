"""fingerprint in C++: checksums of memory, and a look whether it still has them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from insvp_fast.runtime.native.library import call, i32, i64, ptr

__all__ = ["LINES", "Checksums"]

LINES = 128  # cache lines of a block of 8 KB

_FILL = [ptr, i64, ptr]
_SAME = [ptr, i64, i64, ptr]


class Checksums:
    """Of each of the pieces of memory (address, bytes), one for line 0 of all blocks, one for line 1, and so on.

    The memory has to be there whenever they are asked. Raises RuntimeError where the library is not in use.
    """

    def __init__(self, pieces: Sequence[tuple[int, int]]) -> None:
        self._sums = [(ctypes.c_uint64 * LINES)() for _ in pieces]
        self._pieces = [*pieces]
        for piece, sums in zip(pieces, self._sums, strict=True):
            call("fingerprint", _FILL, *piece, ctypes.addressof(sums))
        self._fill_table()

    def _fill_table(self) -> None:
        """Rows of the C struct Region."""
        rows = [(*piece, ctypes.addressof(sums)) for piece, sums in zip(self._pieces, self._sums, strict=True)]
        self._table = (i64 * (3 * len(rows)))(*(number for row in rows for number in row))
        self._address = ctypes.addressof(self._table)

    @classmethod
    def of_all(cls, several: Sequence[Checksums]) -> Checksums:
        """Those of all pieces of several."""
        joined = cls([])
        for one in several:
            joined._sums += one._sums
            joined._pieces += one._pieces
        joined._fill_table()
        return joined

    def hold(self, line: int) -> bool:
        """Whether the memory has its old checksum of one line, or, up to 64 KB, of all."""
        same = i32()
        call("fingerprint_same", _SAME, self._address, len(self._sums), line, ctypes.addressof(same))
        return bool(same.value)
