"""The endpoints as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor

from insvp_fast.data.images import Images
from insvp_fast.errors import DataError, TrainingError
from insvp_fast.serving.batcher import Batcher
from insvp_fast.serving.metrics import Metrics
from insvp_fast.serving.refusals import Refusal, answer_refusal
from insvp_fast.serving.uploads import Limits, open_uploads
from insvp_fast.training.prediction import Classifier

__all__ = ["DEFAULT_TOP_K", "Service", "create_app"]

DEFAULT_TOP_K = 5


def create_app(
    classifiers: Mapping[str, Classifier],
    limits: Limits | None = None,
    max_batch: int = 8,
    max_wait: float = 0.005,
    workers: int = 2,
) -> Starlette:
    """The application that serves these models by their names; its lifespan warms them up.

    Args:
        max_batch, max_wait: as in ``Batcher``, for each model.
        workers: threads that decode and prepare images.
    """
    service = Service(classifiers, limits or Limits(), max_batch, max_wait, workers)
    routes = [
        Route("/predict", service.predict, methods=["POST"]),
        Route("/health", service.health),
        Route("/models", service.models),
        Route("/metrics", service.show_metrics),
    ]
    elsewhere = {404: service.refuse_elsewhere, 405: service.refuse_elsewhere}
    app = Starlette(routes=routes, lifespan=service.lifespan, exception_handlers=elsewhere)  # type: ignore[arg-type]
    app.router.redirect_slashes = False  # to an address made of what the client calls this host
    return app


class Service:
    """The state behind the endpoints: all models compute in one thread, images are decoded in others."""

    def __init__(
        self, classifiers: Mapping[str, Classifier], limits: Limits, max_batch: int, max_wait: float, workers: int
    ) -> None:
        self._classifiers, self._limits, self._max_batch = dict(classifiers), limits, max_batch
        self._model_thread, self._decoders = ThreadPoolExecutor(1, "model"), ThreadPoolExecutor(workers, "decode")
        self._batchers: dict[str, Batcher[Tensor, Tensor]] = {
            name: Batcher(partial(self._compute, name), self._model_thread, max_batch, max_wait)
            for name in self._classifiers
        }
        self._metrics = Metrics(lambda: sum(map(len, self._batchers.values())))
        self._free_decoders, self._requests, self._ready = asyncio.Semaphore(workers), 0, False

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Warm the models up, then run until the last request is answered."""
        with self._model_thread, self._decoders:
            await asyncio.get_running_loop().run_in_executor(self._model_thread, self._warm_up)
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(batcher.run()) for batcher in self._batchers.values()]
                self._ready = True
                yield
                self._ready = False
                for task in running:
                    task.cancel()

    def _warm_up(self) -> None:
        for classifier in self._classifiers.values():
            for size in {1, self._max_batch}:
                classifier.logits(torch.zeros(size, *classifier.image_shape))

    def _compute(self, name: str, images: list[Tensor]) -> list[Tensor]:
        logits = self._classifiers[name].logits(torch.stack(images))
        self._metrics.batch_size.labels(name).observe(len(images))
        self._metrics.images.labels(name).inc(len(images))
        return list(logits)

    async def predict(self, request: Request) -> Response:
        """Answer POST /predict, and count it."""
        start, status = time.perf_counter(), 500
        try:
            response = await self._answer(request)
            status = response.status_code
        except Refusal as refusal:
            self._metrics.errors.labels(refusal.kind).inc()
            response = answer_refusal(refusal)
            status = response.status_code
        except Exception:
            self._metrics.errors.labels("internal").inc()
            raise
        finally:
            self._metrics.requests.labels(str(status)).inc()
            self._metrics.latency.observe(time.perf_counter() - start)
        return response

    def refuse_elsewhere(self, request: Request, error: HTTPException) -> Response:
        """Answer a request for a path that there is not, or with a method that it does not take, and count it."""
        kind = "unknown_path" if error.status_code == 404 else "wrong_method"
        message = f"{request.method} {request.url.path}: expected POST /predict, or GET /health, /models or /metrics"
        response = answer_refusal(Refusal(kind, message))
        response.headers.update(error.headers or {})
        self._metrics.errors.labels(kind).inc()
        self._metrics.requests.labels(str(response.status_code)).inc()
        return response

    async def _answer(self, request: Request) -> Response:
        name, top_k = self._query(request)
        if self._requests >= self._limits.max_requests:
            raise Refusal("busy", f"{self._requests} requests are being answered: try again later")
        self._requests += 1
        try:
            async with open_uploads(request, self._limits) as uploads:
                images = self._classifiers[name].images([upload.file for upload in uploads], self._limits.max_pixels)
                found = await asyncio.gather(*(self._classify(name, images, i, request) for i in range(len(images))))
        finally:
            self._requests -= 1
        predictions = [
            {"file": upload.name} | self._describe(name, logits, top_k)
            for upload, logits in zip(uploads, found, strict=True)
        ]
        readable = any(isinstance(logits, Tensor) for logits in found)
        return JSONResponse({"model": name, "predictions": predictions}, 200 if readable else 422)

    def _query(self, request: Request) -> tuple[str, int]:
        """The model's name and top_k."""
        query, names = request.query_params, list(self._classifiers)
        if unknown := query.keys() - {"model", "top_k"}:
            raise Refusal("invalid_query", f"unknown in the query: {', '.join(sorted(unknown))}")
        if "model" not in query and len(names) > 1:
            raise Refusal("invalid_query", f"no model in the query: expected one of {', '.join(names)}")
        if (name := query.get("model", names[0])) not in self._classifiers:
            raise Refusal("unknown_model", f"there is no model {name}: expected one of {', '.join(names)}")
        top_k = query.get("top_k", str(DEFAULT_TOP_K))
        if not re.fullmatch("[1-9][0-9]{0,8}", top_k):
            raise Refusal("invalid_query", f"top_k is {top_k}: expected a positive integer")
        return name, int(top_k)

    async def _classify(self, name: str, images: Images, index: int, request: Request) -> Tensor | DataError:
        """The logits of an image, or why it cannot be read."""
        async with self._free_decoders:  # so that what follows is asked when the image's turn has come
            if await request.is_disconnected():
                return DataError("nobody waits for the answer")
            try:
                decoding = asyncio.get_running_loop().run_in_executor(self._decoders, images.__getitem__, index)
                image, _ = await decoding
            except DataError as error:
                self._metrics.errors.labels("unreadable_image").inc()
                return error
        return await self._batchers[name].submit(image)

    def _describe(self, name: str, logits: Tensor | DataError, top_k: int) -> dict[str, Any]:
        if isinstance(logits, DataError):
            return {"error": str(logits)}
        try:
            classes, probabilities = zip(*self._classifiers[name].rank(logits[None], top_k)[0], strict=True)
        except TrainingError as error:  # JSON has no such numbers
            raise Refusal("not_finite", f"{name}: {error}") from error
        return {"classes": classes, "probabilities": probabilities}

    async def health(self, request: Request) -> Response:
        """Answer GET /health: whether requests are computed."""
        return JSONResponse({"ready": self._ready}, 200 if self._ready else 503)

    async def models(self, request: Request) -> Response:
        """Answer GET /models: the names, and what each expects and answers."""
        described = {
            name: {"classes": classifier.class_names, "input_size": classifier.image_shape}
            for name, classifier in self._classifiers.items()
        }
        return JSONResponse({"models": described})

    async def show_metrics(self, request: Request) -> Response:
        """Answer GET /metrics."""
        return self._metrics.answer()
