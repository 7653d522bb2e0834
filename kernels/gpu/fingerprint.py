"""Checksums of memory that should not change, such as frozen weights: Triton kernel and launcher.

Memory is divided as in kernels/cpu/fingerprint, into blocks of 128 lines of 64 bytes. Checksum l covers line l of
all blocks; it is the sum of a hash of each word and its position. Here a word has 4 bytes, and bytes behind the last
whole word are not read.
"""

import torch
import triton
import triton.language as tl
from insvp_fast.kernels.gpu import chip
from torch import Tensor

LINE = tl.constexpr(16)  # words in a line
CONSTANTS = {"LINES": 128, "BLOCK": 64, **chip.launch_options(4, 2)}


@triton.jit
def _fingerprint_kernel(table_ptr, sums_ptr, first_line, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """One program per piece of memory and line; the table has the address and the number of words of each piece."""
    piece, line = tl.program_id(0), tl.program_id(1)
    data_ptr = tl.load(table_ptr + 2 * piece).to(tl.pointer_type(tl.int32))
    words = tl.load(table_ptr + 2 * piece + 1)
    total = tl.zeros((BLOCK, LINE), tl.int64)
    for block in range(0, tl.cdiv(words, LINES * LINE), BLOCK):
        row = (block + tl.arange(0, BLOCK)).to(tl.int64) * LINES + first_line + line
        place = row[:, None] * LINE + tl.arange(0, LINE)[None, :]
        exists = place < words
        x = tl.load(data_ptr + place, exists, 0).to(tl.int64) + place * -7046029254386353131
        x = (x ^ (x >> 30)) * -4658895280553007687
        x = (x ^ (x >> 27)) * -7723592293110705685
        total += tl.where(exists, x ^ (x >> 31), 0)
    tl.store(sums_ptr + piece * tl.num_programs(1) + line, tl.sum(tl.sum(total, 1), 0))


def fingerprint(table: Tensor, first_line: int, num_lines: int) -> Tensor:
    """The checksums ``first_line`` to ``first_line + num_lines - 1`` of pieces of memory.

    Args:
        table: [n, 2], int64, on the device of the memory: the address of each piece, a multiple of 4, and its words.

    Returns:
        [n, num_lines], int64.

    Raises:
        RuntimeError: for a CPU tensor outside of the interpreter.
    """
    chip.require_arch("fingerprint", table)
    sums = table.new_empty(len(table), num_lines)
    if len(table):
        with torch.cuda.device_of(table):
            _fingerprint_kernel[(len(table), num_lines)](table, sums, first_line, **CONSTANTS)
    return sums
