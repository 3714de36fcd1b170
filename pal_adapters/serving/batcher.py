"""Requests that arrive together become one batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pal_adapters.multitask import RequestError

from .checks import CallError

Request = Mapping[str, Any]


class QueueFullError(Exception):
    """More requests are waiting than the queue allows."""


@dataclass
class _Waiting:
    index: int  # among the requests of its call
    request: Request
    answer: asyncio.Future[Any]


class Batcher:
    """Predicts requests in batches, in a single worker thread.

    A batch starts when `max_batch` requests wait, or `max_wait` seconds after the first of them arrived. While it
    runs, others gather for the next one. Everything that touches the model runs in the worker thread, so a task is
    never added or removed during a batch.

    Args:
        predict: Computes the predictions of a batch, in order.
        max_batch: Largest batch.
        max_wait: Seconds to wait for more requests.
        max_queue: Number of requests that may wait.
    """

    def __init__(
        self, predict: Callable[[Sequence[Request]], Sequence[Any]], *, max_batch: int, max_wait: float, max_queue: int
    ) -> None:
        self._predict = predict
        self._max_batch, self._max_wait, self._max_queue = max_batch, max_wait, max_queue
        self._waiting: deque[_Waiting] = deque()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="pal_adapters")
        self._closing = False

    @property
    def waiting(self) -> int:
        """Number of requests waiting for their batch."""
        return len(self._waiting)

    async def start(self) -> None:
        """Starts forming batches, in the running event loop."""
        self._some, self._full = asyncio.Event(), asyncio.Event()
        self._loop_task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Answers the waiting requests, then stops."""
        self._closing = True
        self._some.set()
        self._full.set()
        await self._loop_task
        self._worker.shutdown()

    async def submit(self, requests: Sequence[Request]) -> list[Any]:
        """The predictions of these requests, in order.

        Raises:
            QueueFullError: If too many requests are waiting already.
        """
        if len(self._waiting) + len(requests) > self._max_queue:
            raise QueueFullError
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(index, request, loop.create_future()) for index, request in enumerate(requests)]
        self._waiting.extend(waiting)
        self._signal()
        return list(await asyncio.gather(*(one.answer for one in waiting)))

    async def in_worker(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of a function that must not run during a batch."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    def _signal(self) -> None:
        if self._waiting:
            self._some.set()
        if len(self._waiting) >= self._max_batch:
            self._full.set()

    async def _run(self) -> None:
        while True:
            await self._some.wait()
            if self._max_wait:
                with suppress(TimeoutError, asyncio.TimeoutError):  # two classes in Python 3.10
                    await asyncio.wait_for(self._full.wait(), self._max_wait)
            count = min(len(self._waiting), self._max_batch)
            batch = [self._waiting.popleft() for _ in range(count)]
            if not self._closing:
                self._some.clear()
                self._full.clear()
                self._signal()
            elif not batch:
                return
            await self._answer([one for one in batch if not one.answer.done()])

    async def _answer(self, batch: list[_Waiting]) -> None:
        while batch:
            try:
                answers = await self.in_worker(self._predict, [one.request for one in batch])
            except RequestError as error:  # accepted when it arrived; since then its task was removed
                one = batch.pop(error.index)
                _fail([one], CallError(error.reason, index=one.index))
            except Exception as error:  # of whatever kind: it belongs to the callers, and the service goes on
                return _fail(batch, error)
            else:
                for one, answer in zip(batch, answers, strict=True):
                    if not one.answer.done():
                        one.answer.set_result(answer)
                return


def _fail(batch: Sequence[_Waiting], error: Exception) -> None:
    for one in batch:
        if not one.answer.done():
            one.answer.set_exception(error)
