"""Checksums of memory that should not change, such as frozen weights: Triton kernel and launcher.

Memory is divided as in kernels/cpu/fingerprint, into blocks of 128 lines of 64 bytes. Checksum l covers line l of
all blocks; it is the sum of a hash of each word and its position. Here a word has 2 bytes, as the smallest numbers that
are packed, which may stand at any multiple of these. A look at one line reads all lines of a small piece.
"""

import torch
import triton
import triton.language as tl
from insvp_fast.kernels.gpu import chip
from torch import Tensor

WORD = tl.constexpr(2)  # bytes
LINE = tl.constexpr(32)  # words in a line
LAUNCH = {"LINES": 128, "BLOCK": 64, **chip.launch_options(4, 2)}


@triton.jit(do_not_specialize=["first_line"])  # another line every time
def _fingerprint_kernel(table_ptr, sums_ptr, first_line, small, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """One program per piece of memory and line, or all lines of a small piece; the table has addresses and bytes."""
    piece, line = tl.program_id(0), tl.program_id(1)
    data_ptr = tl.load(table_ptr + 2 * piece).to(tl.pointer_type(tl.int16))
    nbytes = tl.load(table_ptr + 2 * piece + 1)
    words = nbytes // WORD
    step, first = tl.where(nbytes <= small, 1, LINES), tl.where(nbytes <= small, 0, first_line + line)
    total = tl.zeros((BLOCK, LINE), tl.int64)
    for block in range(0, tl.cdiv(words, step * LINE), BLOCK):
        row = (block + tl.arange(0, BLOCK)).to(tl.int64) * step + first
        place = row[:, None] * LINE + tl.arange(0, LINE)[None, :]
        exists = place < words
        x = tl.load(data_ptr + place, exists, 0).to(tl.int64) + place * -7046029254386353131
        x = (x ^ (x >> 30)) * -4658895280553007687
        x = (x ^ (x >> 27)) * -7723592293110705685
        total += tl.where(exists, x ^ (x >> 31), 0)
    tl.store(sums_ptr + piece * tl.num_programs(1) + line, tl.sum(tl.sum(total, 1), 0))


def fingerprint(table: Tensor, first_line: int, num_lines: int, small: int = 0) -> Tensor:
    """The checksums ``first_line`` to ``first_line + num_lines - 1`` of pieces of memory.

    Args:
        table: [n, 2], int64, on the device of the memory: the address and the bytes of each piece, multiples of 2.
        small: the most bytes of a piece whose checksum is the sum of all its lines, whichever is asked for.

    Returns:
        [n, num_lines], int64.

    Raises:
        RuntimeError: for a CPU tensor outside of the interpreter.
    """
    chip.require_arch("fingerprint", table)
    sums = table.new_empty(len(table), num_lines)
    if len(table):
        with torch.cuda.device_of(table):
            _fingerprint_kernel[(len(table), num_lines)](table, sums, first_line, small, **LAUNCH)
    return sums
