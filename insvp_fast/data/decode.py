"""From an image file to RGB pixels: training, caches, evaluation, prediction and checks all read images here."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

from insvp_fast.errors import DataError

__all__ = ["SUFFIXES", "read_image", "to_rgb"]

UPRIGHT = {  # the operation that undoes each EXIF orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow's names of the formats that are read. Its others stay closed: for EPS, say, it starts Ghostscript.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (*IMG_EXTENSIONS, ".apng", ".avif", ".gif", ".jfif", ".jp2")  # torchvision's, and others that Pillow reads
MAX_SCANS = 100  # of a JPEG: each passes over all pixels, and costs a few bytes; libtiff allows as many
MAX_PARTS = 10_000  # segments of a JPEG, chunks of a PNG, tags, tiles, strips, fractions of a TIFF; few have a hundred
MAX_HEADER = 10_000  # bytes of netpbm before its pixels, which Pillow reads one by one
MAX_EXIF = 2**16  # bytes of EXIF data, as a segment of a JPEG holds; each fraction in them becomes an object
MAX_ASPECT = 100  # of the longer to the shorter side: resizing to a shorter side multiplies the pixels by it
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags, and a value of the second
TILE = 322, 323  # TIFF tags: width and height
OFFSETS = 273, 324  # TIFF tags: where strips and tiles are
DIRECTORIES = 34665, 34853, 40965  # TIFF tags: where further tags are, of EXIF, GPS and interoperability
SHORT, FRACTIONS = 3, (5, 10)  # types of TIFF's values; of each of the latter Pillow makes an object
SEGMENT = re.compile(rb"\xff([\x02-\xcf\xd9-\xfe])")  # of JPEG; other markers have no content, 0 is data
COMMENT = re.compile(rb"#[^\r\n]*[\r\n]?")  # of netpbm
SCAN, END = b"\xda", b"\xd9"
JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
PLAIN = b"P1", b"P2", b"P3"  # netpbm whose pixels are written as text
NETPBM = b"P0", b"P4", b"P5", b"P6", b"Pf", b"Py"  # the others that Pillow reads
TIFF = b"II*\0", b"II+\0", b"II\0*", b"MM\0*", b"MM\0+", b"MM*\0"


def read_image(
    source: str | Path | BinaryIO, name: object = None, exif_rotation: bool = True, max_pixels: int | None = None
) -> Image.Image:
    """Read an image file of one of ``FORMATS`` as 8-bit RGB; of several frames or pages, the first.

    Args:
        source: a path, or an open file.
        name: what messages call the image; None for the path.
        exif_rotation: as in ``to_rgb``.
        max_pixels: refuse, before any pixel is decoded, an image that has more of them, whose longer side is over 100
            times the shorter, or that takes many passes or has many parts, AVIF, whose header does not say how many
            pixels are decoded, and netpbm in plain text; and, once it is decoded, a PNG or WebP with long EXIF data.
            None reads all that Pillow does.

    Raises:
        DataError: naming the file, if it is missing, damaged, no image, too large, or its pixels have no known range.
    """
    try:
        if max_pixels is not None:  # before Pillow, which looks at every part when it opens a file
            _check_parts(_content(source))
        with Image.open(source, formats=_installed_formats()) as image:
            if max_pixels is not None:
                _check_cost(image, max_pixels)
                _check_exif(_exif_size(image))
            return to_rgb(image, exif_rotation)
    except UnidentifiedImageError as error:  # whose message would show the address of an open file
        raise DataError(f"{name or source}: not an image that can be read (none of {', '.join(FORMATS)})") from error
    except Exception as error:  # Pillow's decoders raise errors of many types for broken files
        raise DataError(f"{name or source}: not an image that can be read ({error})") from error


@cache
def _installed_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # older versions of Pillow have no AVIF


def _check_cost(image: ImageFile.ImageFile, max_pixels: int) -> None:
    """Refuse an image that is open, and would take too much to decode."""
    width, height = image.size
    _check_size("", width, height, max_pixels)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(f"it has {width}x{height} pixels: expected sides of at most {MAX_ASPECT}:1")
    # what is decoded whole, also where the image is smaller
    tile_width, tile_height = (_tags(image).get(tag, 1) for tag in TILE)
    _check_size("tiles of ", tile_width, tile_height, max_pixels)
    if image.format == "AVIF":  # its frames are decoded whole, then scaled to the size in the header
        raise ValueError("it is AVIF, which does not say how many pixels are decoded: expected another format")


def _exif_size(image: ImageFile.ImageFile) -> int:
    """Bytes of EXIF data, which of a PNG are known once it is loaded; those of a TIFF are tags, which were counted."""
    image.load()
    text = "".join(image.info.get("Raw profile type exif", "").split()[2:])  # behind name and length
    return 0 if image.format == "TIFF" else max(len(image.info.get("exif", b"")), len(text) // 2)


def _check_exif(size: int) -> None:
    """Refuse long EXIF data."""
    if size > MAX_EXIF:
        raise ValueError(f"it has {size:,} bytes of EXIF data: expected at most {MAX_EXIF:,}")


def _check_size(what: str, width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(f"it has {what}{width}x{height} pixels: expected at most {max_pixels:,}")


def _content(source: str | Path | BinaryIO) -> bytes:
    if isinstance(source, (str, Path)):
        return Path(source).read_bytes()
    source.seek(0)  # as Pillow does, wherever the last reader has left it
    return source.read()


def _check_parts(content: bytes) -> None:
    """Refuse a file of which every part costs time that its pixels do not tell."""
    if content.startswith(JPEG):
        _check_scans(content)
    elif content.startswith(PNG):
        _check_chunks(content)
    elif content.startswith(PLAIN):  # for each of its comments Pillow copies what is left of a block
        raise ValueError(
            f"it is netpbm in plain text ({content[:2].decode()}): expected a binary one, or another format"
        )
    elif content.startswith(NETPBM):
        _check_header(content)
    elif content.startswith(TIFF):
        _check_tags(content)


def _check_header(content: bytes) -> None:
    """Refuse netpbm of many spaces or long comments before its pixels."""
    words = COMMENT.sub(b"", content[:MAX_HEADER]).split()
    if len(words) < (3 if content.startswith(b"P4") else 4):  # its kind, width, height and, but for bits, the maximum
        raise ValueError(f"its header is longer than {MAX_HEADER:,} bytes, or not whole: expected a whole one of fewer")


def _check_tags(content: bytes) -> None:
    """Refuse a TIFF whose first image has many tags, tiles, strips or fractions; the header is read as Pillow does."""
    order: Any = "little" if content.startswith(b"II") else "big"
    size, counter = (8, 8) if content[2:3] == b"+" else (4, 2)  # bytes of a number, and of that of tags

    def number(position: int, size: int) -> int:
        return int.from_bytes(content[position : position + size], order)

    directories, seen, fractions, step = [number(size, size)], set[int](), 0, 4 + 2 * size
    for directory in directories:
        if (tags := number(directory, counter)) > MAX_PARTS:
            raise ValueError(f"it has {tags:,} tags: expected at most {MAX_PARTS:,}")
        for tag in range(directory + counter, directory + counter + tags * step, step):
            name, kind, count = number(tag, 2), number(tag + 2, 2), number(tag + 4, size)
            fractions += count if kind in FRACTIONS else 0
            if name in OFFSETS and count > MAX_PARTS:
                raise ValueError(f"it has {count:,} tiles or strips: expected at most {MAX_PARTS:,}")
            if fractions > MAX_PARTS:
                raise ValueError(f"it has over {MAX_PARTS:,} fractions in its tags: expected at most {MAX_PARTS:,}")
            if name in DIRECTORIES and name not in seen:  # of tags of one name Pillow takes the first
                seen.add(name)
                directories.append(number(tag + 4 + size, 2 if kind == SHORT else size))


def _check_chunks(content: bytes) -> None:
    """Refuse a PNG of many chunks; what is behind its end does not count."""
    position, chunks = len(PNG), 0
    while (name := content[position + 4 : position + 8]) and name != b"IEND":
        chunks += 1
        if chunks > MAX_PARTS:
            raise ValueError(f"it has over {MAX_PARTS:,} chunks: expected at most {MAX_PARTS:,}")
        position += 12 + int.from_bytes(content[position : position + 4], "big")


def _check_scans(content: bytes) -> None:
    """Refuse a JPEG of many scans; what is behind its end does not count, as a film that a phone puts there."""
    position, scans, segments, exif = 2, 0, 0, 0
    while (found := SEGMENT.search(content, position)) and found[1] != END:
        scans, segments = scans + (found[1] == SCAN), segments + 1
        if scans > MAX_SCANS:
            raise ValueError(f"it has over {MAX_SCANS} scans: expected at most {MAX_SCANS}")
        if segments > MAX_PARTS:
            raise ValueError(f"it has over {MAX_PARTS:,} segments: expected at most {MAX_PARTS:,}")
        size = max(2, int.from_bytes(content[found.end() : found.end() + 2], "big"))
        exif += size if content[found.start() : found.start() + 10].endswith(b"Exif\0\0") else 0
        _check_exif(exif)  # which are read while it is opened
        position = found.end() + size


def to_rgb(image: Image.Image, exif_rotation: bool = True) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    Like ``image.convert("RGB")``, which torchvision and timm use, this drops transparency and keeps the color of
    transparent pixels. Unlike it, 16-bit gray is scaled by its range and floating point by 255 instead of clipped.

    Args:
        exif_rotation: rotate and flip the image as its EXIF orientation says. Pillow always applies TIFF's own
            orientation tag.

    Raises:
        ValueError: if the pixels are integers of unknown range, or floating point outside [0, 1].
    """
    image.load()  # some formats know their EXIF data only after this
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if exif_rotation else 1
    if image.mode == "F" or image.mode.startswith("I"):
        rgb = _to_8_bits(image).convert("RGB")
    else:
        image.info.pop("transparency", None)  # of a palette: Pillow would warn that it is dropped
        straight = image.convert(PREMULTIPLIED[image.mode]) if image.mode in PREMULTIPLIED else image
        rgb = straight.convert("RGB")
    operation = UPRIGHT.get(orientation)
    if operation is None:
        return rgb
    upright = rgb.transpose(operation)
    upright.info.clear()  # of the orientation, as it is undone
    return upright


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Convert floating point or wide integers, [h, w], to mode L."""
    pixels, white = np.asarray(image).astype(np.float64), _white(image)
    lowest, highest = pixels.min(), pixels.max()
    if not 0 <= lowest <= highest <= white:  # also false for NaN
        raise ValueError(f"its pixels go from {lowest:g} to {highest:g}: expected 0 to {white}")
    if _tags(image).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        pixels = white - pixels
    return Image.fromarray(np.rint(pixels * (255 / white)).astype(np.uint8))


def _white(image: Image.Image) -> int:
    """The largest pixel value that the image's format allows."""
    if image.mode == "F":
        return 1
    if image.mode.startswith("I;16") and image.format == "TIFF":
        return 2 ** _tags(image)[BITS][0] - 1
    if image.format in ("PNG", "PPM", "JPEG2000"):  # Pillow scales fewer bits to 16
        return 65535
    found = f"{image.format} of mode {image.mode}"
    raise ValueError(f"{found}: integers of unknown range: expected 8 or 16 bits, unsigned")


def _tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})
