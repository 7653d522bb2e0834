"""The one way from an image file to RGB pixels: training, caches, evaluation, prediction and checks all read by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image

from insvp_fast.errors import DataError

__all__ = ["read_picture", "to_rgb"]

UPRIGHT = {  # by EXIF's orientation; 1 is upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of TIFF


def read_picture(source: str | Path | BinaryIO, name: object = None, exif_rotation: bool = True) -> Image.Image:
    """The image in a file, 8-bit RGB; of several frames or pages the first.

    Args:
        source: a path, or an open file.
        name: what to call it in a message; None for the path itself.
        exif_rotation: as in ``to_rgb``.

    Raises:
        DataError: naming the file, if it is missing, damaged, no image, or its pixels have no known range.
    """
    try:
        with Image.open(source) as image:
            return to_rgb(image, exif_rotation)
    except Exception as error:  # Pillow's decoders raise errors of many kinds for broken files
        raise DataError(f"{name or source}: not an image that can be read ({error})") from error


def to_rgb(image: Image.Image, exif_rotation: bool = True) -> Image.Image:
    """An image of any mode as 8-bit RGB.

    As ``image.convert("RGB")``, which torchvision and timm use: transparency is dropped, the colors beneath it show.
    Besides, 16-bit gray is scaled by its range, and floating point by 255, where ``convert`` would cut off at 255.

    Args:
        exif_rotation: turn and mirror the image as its EXIF orientation says. TIFF's own orientation is always applied.

    Raises:
        ValueError: if the pixels are integers of unknown range, or floating point outside [0, 1].
    """
    image.load()  # before its EXIF is read: some formats know it only then
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1) if exif_rotation else 1
    if image.mode == "F" or image.mode.startswith("I"):
        rgb = _to_8_bits(image).convert("RGB")
    else:
        image.info.pop("transparency", None)  # of a palette; Pillow would warn that it is lost
        rgb = image.convert(PREMULTIPLIED.get(image.mode, image.mode)).convert("RGB")
    turn = UPRIGHT.get(orientation)
    return rgb if turn is None else rgb.transpose(turn)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Floating point or wide integers, [h, w], to mode L."""
    pixels, white = np.asarray(image).astype(np.float64), _white(image)
    lowest, highest = pixels.min(), pixels.max()
    if not 0 <= lowest <= highest <= white:  # nor NaN
        raise ValueError(f"its pixels go from {lowest:g} to {highest:g}, expected 0 to {white}")
    if _tags(image).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        pixels = white - pixels
    return Image.fromarray(np.rint(pixels * (255 / white)).astype(np.uint8))


def _white(image: Image.Image) -> int:
    """The largest value of a pixel, by convention of its format."""
    if image.mode == "F":
        return 1
    if image.mode.startswith("I;16") and image.format == "TIFF":
        return 2 ** _tags(image)[BITS][0] - 1
    if image.format in ("PNG", "PPM", "JPEG2000"):  # Pillow scales fewer bits to 16
        return 65535
    found = f"{image.format} of mode {image.mode}"
    raise ValueError(f"{found}: integers of unknown range, expected 8 or 16 bits, unsigned")


def _tags(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})
