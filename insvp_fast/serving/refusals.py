"""What the server refuses, and with which HTTP status."""

from __future__ import annotations

from starlette.responses import JSONResponse

__all__ = ["STATUS", "Refusal", "answer_refusal"]

STATUS = {
    "incomplete_upload": 400,
    "malformed_upload": 400,
    "unknown_model": 404,
    "unknown_path": 404,
    "wrong_method": 405,
    "slow_upload": 408,
    "too_many_bytes": 413,
    "too_many_images": 413,
    "unknown_content_type": 415,
    "invalid_query": 422,
    "no_image": 422,
    "not_finite": 500,
    "busy": 503,
}


class Refusal(Exception):
    """A request that is not answered; ``kind`` is a key of ``STATUS``, and the message is for the client."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def answer_refusal(refusal: Refusal) -> JSONResponse:
    """The answer in JSON: what is wrong, and its kind."""
    headers = {"Retry-After": "1"} if refusal.kind == "busy" else None
    return JSONResponse({"error": str(refusal), "kind": refusal.kind}, STATUS[refusal.kind], headers)
