from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from pal_adapters.multitask import RequestError
from pal_adapters.serving.batcher import Batcher, QueueFullError
from pal_adapters.serving.checks import CallError

LONG = 3600.0  # no test waits for it: a batch that is full does not


class Recorder:
    """Doubles numbers and remembers the batches; the first batch waits until it is let go."""

    def __init__(self, held: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()
        self.started = threading.Event()
        if not held:
            self.go.set()

    def __call__(self, requests: Sequence[Any]) -> list[int]:
        self.batches.append([request["n"] for request in requests])
        self.started.set()
        self.go.wait()
        for index, request in enumerate(requests):
            if request["n"] == 13:
                raise RequestError("gone", index=index)
            if request["n"] == 99:
                raise ValueError("a bug")
        return [2 * request["n"] for request in requests]


def items(*numbers: int) -> list[dict[str, Any]]:
    return [{"n": number} for number in numbers]


def run(predict: Recorder, work: Any, **options: Any) -> Any:
    async def main() -> Any:
        batcher = Batcher(predict, **{"max_batch": 4, "max_wait": LONG, "max_queue": 100, **options})
        await batcher.start()
        try:
            return await work(batcher)
        finally:
            await batcher.close()

    return asyncio.run(main())


def test_calls_that_arrive_together_are_one_batch() -> None:
    predict = Recorder()

    async def work(batcher: Batcher) -> Any:
        return await asyncio.gather(*(batcher.submit(items(n)) for n in range(4)))

    assert run(predict, work) == [[0], [2], [4], [6]]
    assert predict.batches == [[0, 1, 2, 3]]


def test_a_call_that_is_longer_than_a_batch_is_split_and_keeps_its_order() -> None:
    predict = Recorder()
    assert run(predict, lambda batcher: batcher.submit(items(*range(10))), max_wait=0.0) == [2 * n for n in range(10)]
    assert predict.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_requests_gather_while_a_batch_runs() -> None:
    predict = Recorder(held=True)

    async def work(batcher: Batcher) -> Any:
        first = asyncio.create_task(batcher.submit(items(1)))
        await asyncio.to_thread(predict.started.wait)
        others = [asyncio.create_task(batcher.submit(items(n))) for n in (2, 3)]
        while batcher.waiting < 2:
            await asyncio.sleep(0)
        predict.go.set()
        return [await one for one in (first, *others)]

    assert run(predict, work, max_wait=0.0) == [[2], [4], [6]]
    assert predict.batches == [[1], [2, 3]]


def test_an_incomplete_batch_runs_after_the_wait() -> None:
    predict = Recorder()
    assert run(predict, lambda batcher: batcher.submit(items(5)), max_wait=0.001) == [10]


def test_one_bad_request_does_not_spoil_its_batch() -> None:
    predict = Recorder()

    async def work(batcher: Batcher) -> Any:
        return await asyncio.gather(*(batcher.submit(items(n)) for n in (1, 13, 3, 4)), return_exceptions=True)

    found = run(predict, work)
    assert [found[0], *found[2:]] == [[2], [6], [8]]
    assert isinstance(found[1], CallError)
    assert found[1].index == 0
    assert predict.batches == [[1, 13, 3, 4], [1, 3, 4]]


def test_an_error_names_the_place_of_the_request_in_its_call() -> None:
    async def work(batcher: Batcher) -> Any:
        calls = (batcher.submit(items(*numbers)) for numbers in ((1, 2, 3), (4, 5, 13, 6), (7, 8, 9, 10, 11)))
        return await asyncio.gather(*calls, return_exceptions=True)

    first, found, last = run(Recorder(), work)
    assert [first, last] == [[2, 4, 6], [14, 16, 18, 20, 22]]
    assert isinstance(found, CallError)
    assert found.index == 2


def test_an_unexpected_error_reaches_every_caller_and_the_next_batch_runs() -> None:
    predict = Recorder()

    async def work(batcher: Batcher) -> Any:
        broken = [batcher.submit(items(n)) for n in (1, 99, 3, 4)]
        found = await asyncio.gather(*broken, return_exceptions=True)
        return found, await batcher.submit(items(5, 6, 7, 8))

    found, after = run(predict, work)
    assert [type(one) for one in found] == [ValueError] * 4
    assert after == [10, 12, 14, 16]


def test_a_full_queue_rejects_and_recovers() -> None:
    predict = Recorder(held=True)

    async def work(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.submit(items(1)))
        await asyncio.to_thread(predict.started.wait)
        second = asyncio.create_task(batcher.submit(items(2, 3, 4)))
        while batcher.waiting < 3:
            await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            await batcher.submit(items(5))
        predict.go.set()
        assert [await first, await second] == [[2], [4, 6, 8]]
        assert await batcher.submit(items(5)) == [10]

    run(predict, work, max_wait=0.0, max_queue=3)


def test_a_caller_that_is_gone_leaves_the_others_alone() -> None:
    predict = Recorder(held=True)

    async def work(batcher: Batcher) -> Any:
        first = asyncio.create_task(batcher.submit(items(1)))
        await asyncio.to_thread(predict.started.wait)
        gone, stays = (asyncio.create_task(batcher.submit(items(n))) for n in (2, 3))
        while batcher.waiting < 2:
            await asyncio.sleep(0)
        gone.cancel()
        await asyncio.wait([gone])
        predict.go.set()
        return [await first, await stays]

    assert run(predict, work, max_wait=0.0) == [[2], [6]]
    assert predict.batches == [[1], [3]]


def test_closing_answers_what_waits() -> None:
    predict = Recorder()

    async def main() -> Any:
        batcher = Batcher(predict, max_batch=4, max_wait=LONG, max_queue=100)
        await batcher.start()
        calls = asyncio.gather(*(batcher.submit(items(n)) for n in range(3)))
        while batcher.waiting < 3:
            await asyncio.sleep(0)
        await batcher.close()
        return await calls

    assert asyncio.run(main()) == [[0], [2], [4]]


def test_nothing_else_runs_during_a_batch() -> None:
    predict = Recorder(held=True)

    async def work(batcher: Batcher) -> None:
        first = asyncio.create_task(batcher.submit(items(1)))
        await asyncio.to_thread(predict.started.wait)
        order: list[str] = []
        change = asyncio.create_task(batcher.in_worker(order.append, "change"))
        await asyncio.sleep(0)
        assert order == []
        predict.go.set()
        await first
        await change
        assert order == ["change"]

    run(predict, work, max_wait=0.0)
