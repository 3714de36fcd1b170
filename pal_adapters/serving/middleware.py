"""ASGI middleware: limits bodies, reports statuses, answers HEAD, and calls that a stopping server gives up."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class BodyLimit:
    """Rejects bodies of more than `max_bytes` bytes with status 413, whether or not their length is announced.

    Args:
        app: The application.
        max_bytes: Largest body.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = Headers(scope=scope).get("content-length", "0")
        received = int(announced) if announced.isdecimal() else 0
        too_large = received > self.max_bytes
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = {"type": "http.request"} if too_large else await receive()
            received += len(message.get("body", b""))
            if too_large or received > self.max_bytes:
                raise HTTPException(413, f"the body has more than {self.max_bytes} bytes, the limit of this service")
            return message

        await self.app(scope, counted, send)


class HeadAsGet:
    """Answers HEAD as GET without the body, which load balancers ask for.

    Args:
        app: The application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "method": "GET"}, receive, without_body)


class StatusCount:
    """Reports the path and status of every response.

    Args:
        app: The application.
        report: Called with both.
    """

    def __init__(self, app: ASGIApp, report: Callable[[str, int], None]) -> None:
        self.app, self.report = app, report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.report(scope["path"], message["status"])
            await send(message)

        await self.app(scope, receive, counted)


class Stopping:
    """Answers a call that the server cancels, which uvicorn does when its time to shut down is over.

    Args:
        app: The application.
        answer: What such a call gets, unless its response has begun.
    """

    def __init__(self, app: ASGIApp, answer: ASGIApp) -> None:
        self.app, self.answer = app, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except CancelledError:
            if begun or scope["type"] != "http":
                raise
            await self.answer(scope, receive, send)
