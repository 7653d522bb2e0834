"""Fingerprints: checksums that tell whether memory has been written to, without a reference to it.

A look at a fingerprint reads a sample of the memory, another one each time, and small memory in full.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage

from insvp_fast.runtime import native, torch_private, triton_kernels

__all__ = ["SMALL", "Fingerprint", "Region", "fingerprint"]

BLOCK, SMALL = 8192, 65536  # bytes: of which a look reads a part, and up to which it reads all; as in fingerprint.cpp


class Region(NamedTuple):
    """The memory of a tensor."""

    storage: weakref.ref[UntypedStorage]
    offset: int  # bytes from the start of the storage
    nbytes: int

    @classmethod
    def of(cls, x: Tensor, storage: weakref.ref[UntypedStorage]) -> Region:
        """The bytes from the first to the last element of ``x``, which may have any strides."""
        span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        return cls(storage, int(x.storage_offset()) * x.element_size(), span * x.element_size())

    def pieces(self) -> list[Region]:
        """Itself in pieces, each of which a look reads in full."""
        starts = range(0, self.nbytes, SMALL)
        return [self._replace(offset=self.offset + i, nbytes=min(SMALL, self.nbytes - i)) for i in starts]

    def address(self) -> int | None:
        """Where it is now, or None if it is no more."""
        storage = self.storage()
        if storage is None or self.offset + self.nbytes > storage.nbytes():
            return None
        return storage.data_ptr() + self.offset

    def words(self) -> Tensor:
        """Its contents as integers, of the widest type that divides it."""
        storage = self.storage()
        assert storage is not None
        flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, self.offset, (self.nbytes,), (1,))
        types = (torch.int64, torch.int32, torch.int16, torch.uint8)
        return flat.view(next(dtype for dtype in types if (self.offset | self.nbytes) % dtype.itemsize == 0))


class Fingerprint(Protocol):
    """What the memory of some weights was like."""

    def broken(self) -> bool:
        """Whether the next sample of the memory has changed; it has to be where it was."""

    def broken_anywhere(self) -> bool:
        """Whether anything of the memory has changed, or it is no longer there."""


def fingerprint(regions: Sequence[Region], device: torch.device) -> Fingerprint:
    """The fingerprint of memory as it is now: of a CPU by the native library, of a GPU by Triton, else by PyTorch."""
    if device.type == "cuda":
        return PlainFingerprint(regions) if triton_kernels.missing(device) else DeviceFingerprint(regions, device)
    return NativeFingerprint(regions) if native.available() else PlainFingerprint(regions)


def look_at(fingerprints: Sequence[Fingerprint]) -> Callable[[], bool]:
    """A function that tells whether any of these is ``broken``, in one look where the native library can."""
    native_ones = [one for one in fingerprints if isinstance(one, NativeFingerprint)]
    if not native_ones or len(native_ones) < len(fingerprints):
        return lambda: sum(one.broken() for one in fingerprints) > 0
    look = native.Look([one.checksums for one in native_ones])
    return lambda: not look.hold([one.next_line() for one in native_ones])


class NativeFingerprint:
    """Of each block of 8 KB, a look reads one cache line of 128."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions, self._line = regions, 0
        self._addresses = [region.address() for region in regions]
        pieces = zip(self._addresses, regions, strict=True)
        self.checksums = native.Checksums([(address, r.nbytes) for address, r in pieces if address is not None])
        self._look = native.Look([self.checksums])

    def next_line(self) -> int:
        """That of the next look."""
        self._line = (self._line + 1) % native.LINES
        return self._line

    def broken(self) -> bool:
        return not self._look.hold([self.next_line()])

    def broken_anywhere(self) -> bool:
        held = [region.storage() for region in self._regions]  # alive while it is read
        moved = None in held or self._addresses != [region.address() for region in self._regions]
        return moved or not all(self._look.hold([line]) for line in range(native.LINES))


class PlainFingerprint:
    """Of each block of 8 KB, a look reads one word, so that 1024 looks of fp64 or paired fp32 words read everything.

    It waits for a GPU, so that no stream compares what another has not written yet.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions, self._turn = regions, 0
        self._sums = [_sums(region.words()) for region in regions]

    def broken(self) -> bool:
        self._turn += 1
        return any(map(self._differs, self._regions, self._sums))

    def _differs(self, region: Region, sums: Tensor) -> bool:
        words, turn, size = region.words(), self._turn % len(sums), len(sums)
        if region.nbytes <= SMALL:
            return not torch.equal(_sums(words), sums)
        return bool(_mixed(words[turn::size], turn, size).sum().cpu() != sums[turn])

    def broken_anywhere(self) -> bool:
        held = [region.storage() for region in self._regions]  # alive while it is read
        pairs = zip(self._regions, self._sums, strict=True)
        gone = None in held or any(region.address() is None for region in self._regions)
        return gone or not all(torch.equal(_sums(region.words()), sums) for region, sums in pairs)


def _sums(words: Tensor) -> Tensor:
    """The sum over all blocks of each word of a block, on the host."""
    size = BLOCK // words.element_size()
    return F.pad(_mixed(words, 0, 1), (0, -len(words) % size)).view(-1, size).sum(0).cpu()


def _mixed(words: Tensor, first: int, step: int) -> Tensor:
    """Words, of which the first is number ``first`` and the next ``step`` further, mixed with their numbers."""
    x = words.long() + (first + step * torch.arange(len(words), device=words.device)) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31)


def _signed(word: int) -> int:
    return word - (1 << 64)


class DeviceFingerprint:
    """Looked at on a GPU without waiting for it: one launch for all the fingerprints of a forward pass.

    A pass begins where a fingerprint is asked for the second time. What a look finds is known when the GPU has got that
    far, a pass or a few later; until then, packed weights that are out of date are used.
    """

    def __init__(self, regions: Sequence[Region], device: torch.device) -> None:
        self.regions, self.found, self._watch = regions, False, _watch(device)
        self.sums = self._watch.sums(self.rows())
        self._made: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._made = torch.cuda.Event()
            self._made.record(torch.cuda.current_stream(device))

    def sums_in_order(self) -> Tensor:
        """The checksums, for the current stream, which may be another than the one that wrote them."""
        if self._made is not None:
            stream = torch.cuda.current_stream(self.sums.device)
            stream.wait_event(self._made)
            self.sums.record_stream(stream)
        return self.sums

    def rows(self) -> list[tuple[int, int]]:
        """The address and the number of bytes of each region that is still there."""
        rows = []
        for reference, offset, nbytes in self.regions:  # ``Region.address`` in fewer steps: this is done for every pass
            storage = reference()
            if storage is not None and offset + nbytes <= storage.nbytes():
                rows.append((storage.data_ptr() + offset, nbytes))
        return rows

    def broken(self) -> bool:
        self._watch.asked(self)
        return self.found

    def broken_anywhere(self) -> bool:
        held = [region.storage() for region in self.regions]  # alive while it is read
        self.found = None in held or not torch.equal(self._watch.sums(self.rows()), self.sums_in_order())
        return self.found


class _Pass(NamedTuple):
    """The fingerprints of a forward pass together, which are the same ones in the next."""

    held: list[DeviceFingerprint]
    rows: list[tuple[int, int]]
    stream: int | None
    table: Tensor  # the rows, on the device
    sums: Tensor  # [n, LINES], what a look at each line has to find
    changed: Tensor  # [n], on the host


class _Watch:
    """The fingerprints of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._line, self._lock = device, 0, threading.Lock()
        self._asked: dict[DeviceFingerprint, None] = {}  # in this pass, in their order
        self._last: DeviceFingerprint | None = None
        self._pass: _Pass | None = None
        self._looking: torch.cuda.Event | None = None  # reached when the host knows what has changed

    def asked(self, one: DeviceFingerprint) -> None:
        """Note that a forward product asks; where that begins a new pass, see what the last look has found and look."""
        with self._lock:
            if one is self._last:  # once more, as the products with two parts of a weight do
                self._last = None
                return
            if one in self._asked:
                self._begin_pass()
            self._asked[one], self._last = None, one

    def _begin_pass(self) -> None:
        if self._pass is not None and self._looking is not None and self._looking.query():
            self._looking = None
            if self._pass.changed.any():
                self._find(self._pass)
        if self._looking is None:
            self._look()
        self._asked.clear()

    def _find(self, seen: _Pass) -> None:
        owners = [held for held in seen.held for _ in held.regions]
        for owner, changed in zip(owners, seen.changed.tolist(), strict=True):
            owner.found |= changed

    def _look(self) -> None:
        self._line = (self._line + 1) % native.LINES
        # the next look, which writes to tensors of this one, may be in another mode
        with torch.inference_mode(False), torch.no_grad():
            own = self._pass = self._gather()
            changed = self._checksums(own.table, self._line, 1, SMALL)[:, 0] != own.sums[:, self._line]
            own.changed.copy_(changed, non_blocking=True)
        self._looking = torch.cuda.Event()
        self._looking.record(torch.cuda.current_stream(self._device))

    def _gather(self) -> _Pass:
        held, rows, cuda = [], [], self._device.type == "cuda"
        for one in self._asked:
            own_rows = one.rows()
            if len(own_rows) == len(one.sums):
                held.append(one)
                rows += own_rows
        stream = torch_private.current_stream(self._device) if cuda else None  # which wrote the table
        if self._pass is not None and self._pass[:3] == (held, rows, stream):
            return self._pass
        table = self._table(rows)
        sums = torch.cat([table.new_empty(0, native.LINES), *(one.sums_in_order() for one in held)])
        sums = torch.where(table[:, 1:] <= SMALL, sums.sum(1, keepdim=True), sums)
        on_host = torch.empty(len(rows), dtype=torch.bool, device="cpu", pin_memory=cuda)
        return _Pass(held, rows, stream, table, sums, on_host)

    def sums(self, rows: list[tuple[int, int]]) -> Tensor:
        """The checksums of all lines of pieces of memory, [n, LINES]."""
        return self._checksums(self._table(rows), 0, native.LINES)

    def _table(self, rows: list[tuple[int, int]]) -> Tensor:
        table = torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, 2)
        # pinned: a copy from other memory would wait for the GPU
        return table.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else table

    def _checksums(self, table: Tensor, first_line: int, num_lines: int, small: int = 0) -> Tensor:
        """``small``: bytes of a piece up to which each checksum is the sum of all lines."""
        from insvp_fast.kernels.gpu import fingerprint as kernel

        return kernel.fingerprint(table, first_line, num_lines, small)


_watch = cache(_Watch)
