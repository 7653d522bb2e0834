"""Pictures inside of pages, as ``data:`` addresses that need no other file."""

from __future__ import annotations

import base64
import io

import torch
from PIL import Image
from torch import Tensor

__all__ = ["data_uri", "encode_picture"]

LOSSLESS_SIDE = 64  # of pictures up to which PNG is small enough; their single pixels are seen


def data_uri(content: bytes, kind: str) -> str:
    """An image file as the address of an image; ``kind`` as in its media type, such as ``svg+xml``."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def encode_picture(picture: Tensor) -> str:
    """Pixels in [0, 1], [3, H, W], as the address of an image: PNG if it is small, else JPEG."""
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    kind, stream = "png" if max(pixels.shape) <= LOSSLESS_SIDE else "jpeg", io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, quality=85, optimize=True)
    return data_uri(stream.getvalue(), kind)
