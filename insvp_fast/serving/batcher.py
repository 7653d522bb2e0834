"""Dynamic batching: items that arrive one by one are computed together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar

__all__ = ["Batcher"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Batcher(Generic[Item, Result]):
    """Collects items into batches, in the order of their arrival, and computes one batch at a time.

    Batchers that share an executor of one thread take turns. What an item is, only ``compute`` knows.

    Args:
        compute: as many results as items, in their order.
        executor: runs ``compute``.
        max_batch: the most items in a batch.
        max_wait: the seconds after which a batch starts with fewer, counted from the arrival of its first item.
    """

    def __init__(
        self, compute: Callable[[list[Item]], Sequence[Result]], executor: Executor, max_batch: int, max_wait: float
    ) -> None:
        self._compute, self._executor, self._max_batch, self._max_wait = compute, executor, max_batch, max_wait
        self._waiting: asyncio.Queue[tuple[float, Item, asyncio.Future[Result]]] = asyncio.Queue()

    def __len__(self) -> int:
        """The items that no batch has taken yet."""
        return self._waiting.qsize()

    async def submit(self, item: Item) -> Result:
        """The item's result, or the error that ``compute`` raised for its batch."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Result] = loop.create_future()
        self._waiting.put_nowait((loop.time(), item, result))
        return await result

    async def run(self) -> None:
        """Compute batches until it is canceled."""
        loop = asyncio.get_running_loop()
        while True:
            items, futures = await self._collect()
            try:
                results = await loop.run_in_executor(self._executor, self._compute, items)
                answered = list(zip(futures, results, strict=True))
            except Exception as error:
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
                continue
            for future, result in answered:
                if not future.done():  # a request that was given up has canceled it
                    future.set_result(result)

    async def _collect(self) -> tuple[list[Item], list[asyncio.Future[Result]]]:
        arrival, item, future = await self._waiting.get()
        items, futures = [item], [future]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(arrival + self._max_wait):
                while len(items) < self._max_batch:
                    _, item, future = await self._waiting.get()
                    items.append(item)
                    futures.append(future)
        return items, futures
