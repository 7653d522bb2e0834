"""The sizes of the frames in an AVIF file: a decoder decodes them whole, then scales them to what the header says."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["coded_frames"]

TRACK = (b"moov", b"trak", b"mdia", b"minf", b"stbl")  # where an animation has the table of its frames
SEQUENCE_HEADER, FRAMES = 1, (3, 6)  # types of AV1's units; a frame has one of its own, or one with its header alone
MAX_PARTS = 10_000  # of a kind, so that looking at them does not take long; an image has some for each of its tiles


def coded_frames(content: bytes) -> list[tuple[int, int]]:
    """Width and height of each AV1 frame that may be decoded for the first image of a file.

    These are the frames of all its items, with transparency and thumbnails, and of the first sample of each track.

    Raises:
        ValueError: if they cannot be told from the file.
    """
    file, frames = memoryview(content), list[tuple[int, int]]()
    parts = [part for name, body in _boxes(file) if name == b"meta" for part in _items(file, body[4:])]
    parts += [[sample] for table in _find(file, *TRACK) for sample in _first_sample(file, dict(_boxes(table)))]
    units = 0
    for extents in parts:
        size = None
        for kind, payload in (unit for extent in extents for unit in _units(extent)):
            _check_number(units := units + 1)
            if kind == SEQUENCE_HEADER:
                size = _frame_size(_Bits(payload))
            elif kind in FRAMES:
                if size is None:
                    raise ValueError("it has a frame of AV1 without a size: expected a sequence header before it")
                frames.append(size)
    if not frames:
        raise ValueError("it has no frame of AV1 that can be found: expected at least one")
    return frames


def _check_number(parts: int) -> None:
    if parts > MAX_PARTS:
        raise ValueError(f"it has over {MAX_PARTS:,} parts: expected an image of fewer")


class _Bits:
    """Numbers of any number of bits that follow each other."""

    def __init__(self, content: memoryview) -> None:
        self.content, self.position = content, 0

    def take(self, bits: int) -> int:
        end = self.position + bits
        if end > 8 * len(self.content):
            raise ValueError("it ends too early, or a part of it does: expected whole boxes of AVIF")
        number = int.from_bytes(self.content[self.position // 8 : -(-end // 8)], "big") >> (-end % 8)
        self.position = end
        return number & ((1 << bits) - 1)

    def rest(self, size: int | None = None) -> memoryview:
        """The bytes from here on, or so many of them."""
        start = self.position // 8
        if size is not None and start + size > len(self.content):
            raise ValueError("it ends too early, or a part of it does: expected whole boxes of AVIF")
        return self.content[start : None if size is None else start + size]


def _boxes(content: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """Names and contents of the boxes that follow each other."""
    found = 0
    while len(content) >= 8:
        _check_number(found := found + 1)
        header = _Bits(content)
        size, name = header.take(32), header.take(32).to_bytes(4, "big")
        if size == 1:
            size = header.take(64)
        size = size or len(content)  # 0: to the end
        if 8 * size < header.position:
            raise ValueError(f"it has a box of {size} bytes: expected more")
        yield name, content[header.position // 8 : size]
        content = content[size:]


def _find(content: memoryview, *path: bytes) -> Iterator[memoryview]:
    """The boxes at a path of names."""
    if not path:
        yield content
        return
    for name, body in _boxes(content):
        if name == path[0]:
            yield from _find(body, *path[1:])


def _items(file: memoryview, meta: memoryview) -> Iterator[list[memoryview]]:
    """The parts of each item of AV1, in the order of their table."""
    boxes = dict(_boxes(meta))
    coded, found = set(), 0
    for info in _find(meta, b"iinf"):
        for name, entry in _boxes(info[8 if _Bits(info).take(8) else 6 :]):
            bits = _Bits(entry)
            version, _ = bits.take(8), bits.take(24)
            number, _ = bits.take(16 if version < 3 else 32), bits.take(16)
            if name == b"infe" and bits.take(32).to_bytes(4, "big") == b"av01":
                coded.add(number)
    for table in _find(meta, b"iloc"):
        bits = _Bits(table)
        version, _ = bits.take(8), bits.take(24)
        offset_size, length_size, base_size, index_size = (8 * bits.take(4) for _ in range(4))
        for _ in range(bits.take(32 if version == 2 else 16)):
            _check_number(found := found + 1)
            number = bits.take(32 if version == 2 else 16)
            in_meta = version > 0 and bits.take(16) & 15 == 1
            source = boxes.get(b"idat", memoryview(b"")) if in_meta else file
            _, base, extents = bits.take(16), bits.take(base_size), []
            for _ in range(bits.take(16)):
                _check_number(found := found + 1)
                _, start, size = bits.take(index_size if version else 0), bits.take(offset_size), bits.take(length_size)
                extents.append(_Bits(source[base + start :]).rest(size))
            if number in coded:
                yield extents


def _first_sample(file: memoryview, table: dict[bytes, memoryview]) -> Iterator[memoryview]:
    """The data of a track's first sample, if it is AV1."""
    if b"av01" not in bytes(table.get(b"stsd", b"")):
        return
    wide = b"co64" in table
    offsets, sizes = (_Bits(table.get(name, memoryview(b""))) for name in (b"co64" if wide else b"stco", b"stsz"))
    offsets.take(64), sizes.take(32)
    same, _ = sizes.take(32), sizes.take(32)
    yield _Bits(file[offsets.take(64 if wide else 32) :]).rest(same or sizes.take(32))


def _units(extent: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and payload of each unit."""
    while True:
        bits = _Bits(extent)
        _, kind, extended, sized, _ = (bits.take(count) for count in (1, 4, 1, 1, 1))
        bits.take(8 * extended)
        size = _leb128(bits) if sized else len(bits.rest())
        payload = bits.rest(size)
        yield kind, payload
        extent = bits.rest()[size:]
        if not extent:
            return


def _leb128(bits: _Bits) -> int:
    value = 0
    for place in range(8):
        more, digits = bits.take(1), bits.take(7)
        value |= digits << (7 * place)
        if not more:
            break
    return value


def _frame_size(bits: _Bits) -> tuple[int, int]:
    """Width and height by a sequence header (AV1, 5.5.1)."""
    _, _, reduced = bits.take(3), bits.take(1), bits.take(1)
    if reduced:
        bits.take(5)
    elif bits.take(1):
        raise ValueError("it has a sequence header of AV1 with times: expected that of an image")
    else:
        delayed = bits.take(1)
        for _ in range(bits.take(5) + 1):
            _, level = bits.take(12), bits.take(5)
            bits.take(level > 7)
            if delayed and bits.take(1):
                bits.take(4)
    sides = bits.take(4) + 1, bits.take(4) + 1
    width, height = (bits.take(side) + 1 for side in sides)
    # a frame may have any size of so many bits, unless the header is reduced
    if not reduced and 2 ** sum(sides) > 4 * width * height:
        raise ValueError(f"it has room for frames of {sides} bits a side: expected those of {width}x{height} pixels")
    return width, height
