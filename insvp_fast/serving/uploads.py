"""The files of a request, read within limits."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from typing import BinaryIO, NamedTuple

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive

from insvp_fast.serving.refusals import Refusal

__all__ = ["Limits", "Upload", "open_uploads"]

RAW = ("image/", "application/octet-stream")  # content types of a body that is one image


class Limits(NamedTuple):
    """What a request may bring, and how many may be answered at once.

    Attributes:
        max_bytes: of a request's body.
        max_images: in a request.
        max_pixels: of an image; as in ``read_image``.
        max_requests: that are being read, waiting or computed; further ones are refused.
        upload_seconds: for the whole body to arrive.
    """

    max_bytes: int = 16 * 2**20
    max_images: int = 16
    max_pixels: int = 25_000_000
    max_requests: int = 64
    upload_seconds: float = 30.0


class Upload(NamedTuple):
    """An uploaded file with the name that the client gave it, if any."""

    name: str | None
    file: BinaryIO


@contextlib.asynccontextmanager
async def open_uploads(request: Request, limits: Limits) -> AsyncIterator[list[Upload]]:
    """The files of a multipart body, or the one that is the body itself; closed at the end.

    Raises:
        Refusal: if there is none, or the body is of another kind, too large, malformed or slow.
    """
    content_type = request.headers.get("content-type", "").lower()
    if not content_type.startswith(("multipart/form-data", *RAW)):
        raise Refusal(
            "unknown_content_type",
            f"the content type is {content_type or 'missing'}: expected multipart/form-data, image/... or {RAW[1]}",
        )
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > limits.max_bytes:
        raise _too_many_bytes(limits)  # without reading any of it
    request = Request(request.scope, _limited(request.receive, limits))
    async with contextlib.AsyncExitStack() as files:
        try:
            async with asyncio.timeout(limits.upload_seconds):
                if content_type.startswith(RAW):
                    content = await request.body()
                    uploads = [Upload(None, io.BytesIO(content))] if content else []
                else:  # Starlette keeps files of over 1 MB on disk
                    uploads = await _read_form(request, limits.max_images, files)
        except TimeoutError as error:
            message = f"the body did not arrive within {limits.upload_seconds:g} seconds"
            raise Refusal("slow_upload", message) from error
        except UnicodeError as error:  # of some charsets that a client may name
            raise Refusal("malformed_upload", "a name in the body is not in the charset that it declares") from error
        except ClientDisconnect as error:
            raise Refusal("incomplete_upload", "the connection was closed before the whole body had arrived") from error
        except MultiPartException as error:
            if "Too many files" in error.message:
                message = f"more than {limits.max_images} images: expected at most {limits.max_images} in a request"
                raise Refusal("too_many_images", message) from error
            raise Refusal("malformed_upload", error.message) from error
        if not uploads:
            raise Refusal("no_image", "the body holds no file: expected at least one image")
        yield uploads


class _Parser(MultiPartParser):
    """Starlette's, which takes a body that is cut off for a whole one, but is told of the end."""

    ended = False

    def on_end(self) -> None:
        self.ended = True


async def _read_form(request: Request, max_images: int, files: contextlib.AsyncExitStack) -> list[Upload]:
    """The files of a multipart body; ``files`` closes them."""
    async with contextlib.aclosing(request.stream()) as stream:
        parser = _Parser(request.headers, stream, max_files=max_images)
        form = await parser.parse()
    files.push_async_callback(form.close)
    if not parser.ended:
        raise Refusal("incomplete_upload", "the body is cut off: expected the boundary with two hyphens at its end")
    return [_upload(name, value) for name, value in form.multi_items()]


def _upload(name: str, value: UploadFile | str) -> Upload:
    if isinstance(value, str):
        raise Refusal("malformed_upload", f"the field {_encodable(name)} is no file: expected files alone")
    return Upload(_encodable(value.filename or ""), value.file)


def _encodable(text: str) -> str:
    """Text without lone surrogates, which the charset that a client names may yield, and which no answer can hold."""
    return text.encode(errors="replace").decode()


def _limited(receive: Receive, limits: Limits) -> Receive:
    """``receive``, which refuses when more bytes have come than are allowed: not every request declares its length."""
    received = 0

    async def receive_within_limits() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limits.max_bytes:
            raise _too_many_bytes(limits)
        return message

    return receive_within_limits


def _too_many_bytes(limits: Limits) -> Refusal:
    return Refusal("too_many_bytes", f"the body is too large: expected at most {limits.max_bytes:,} bytes")
