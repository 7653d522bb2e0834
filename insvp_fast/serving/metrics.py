"""What the server counts, in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.responses import Response

__all__ = ["Metrics"]

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server.

    Args:
        queue_length: the number of images that wait for the model.
    """

    def __init__(self, queue_length: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        requests = "requests to /predict, and those that fit no endpoint, by HTTP status"
        self.requests = Counter("insvp_requests", requests, ["status"], registry=registry)
        self.errors = Counter(
            "insvp_errors", "refused requests, unreadable images and failures", ["kind"], registry=registry
        )
        self.images = Counter("insvp_images", "images classified", ["model"], registry=registry)
        self.batch_size = Histogram("insvp_batch_size", "images per batch", ["model"], buckets=SIZES, registry=registry)
        self.latency = Histogram("insvp_request_seconds", "time to answer /predict", buckets=SECONDS, registry=registry)
        ProcessCollector(registry=registry)  # memory, CPU time, open files
        queue = Gauge("insvp_queue_length", "images that wait for the model", registry=registry)
        queue.set_function(queue_length)

    def answer(self) -> Response:
        """The answer to GET /metrics."""
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)
