"""The application: routes, status codes and error messages."""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from pal_adapters.errors import ConfigError, PalAdaptersError

from .batcher import Batcher, QueueFullError
from .body import BodyError, read_requests
from .checks import CallError, check_requests, task_folder
from .interface import PredictorLike
from .metrics import Metrics
from .middleware import BodyLimit, HeadAsGet, StatusCount, Stopping
from .options import ServingOptions
from .schema import Answer, Health, Problem, TaskInfo, problems, request_body

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_LATER = {"Retry-After": "1"}
_BEARER = HTTPBearer(auto_error=False, description="The administrator's token")


def create_app(
    predictor: PredictorLike, options: ServingOptions | None = None, *, admin_token: str | None = None
) -> FastAPI:
    """An ASGI application that serves the tasks of a predictor.

    Args:
        predictor: Answers the requests. The application is the only one to call it while it runs.
        options: Limits and batching.
        admin_token: Lets whoever sends it as a bearer token add and remove tasks; needs `options.tasks_root`.

    Raises:
        ConfigError: If the token is short enough to guess.
    """
    options = options or ServingOptions()
    if admin_token is not None and len(admin_token) < 16:
        raise ConfigError("the administrator's token is too short: use at least 16 characters.")
    metrics = Metrics()

    def predict(requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        start = time.perf_counter()
        found = [prediction.to_dict() for prediction in predictor(requests)]
        metrics.batch_seconds.observe(time.perf_counter() - start)
        metrics.batch_size.observe(len(requests))
        return found

    batcher = Batcher(
        predict, max_batch=options.max_batch, max_wait=options.max_wait_ms / 1000, max_queue=options.max_queue
    )
    metrics.waiting.set_function(lambda: batcher.waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await batcher.start()
        yield
        await batcher.close()

    app = FastAPI(
        title="pal_adapters",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect would name the host that the caller sent
        responses={"default": {"model": Problem, "description": "An error"}},
    )
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, max_bytes=options.max_body_bytes)
    app.add_middleware(Stopping, answer=_problem(503, "the service is stopping", headers=_LATER))
    app.add_middleware(StatusCount, report=metrics.count_call)
    _report_problems(app)

    def checked(body: bytes) -> tuple[list[dict[str, Any]], bool]:
        requests, many = read_requests(body)
        check_requests(requests, predictor, options)
        return requests, many

    @app.post(
        "/predict",
        summary="Answer one request, or a list of requests for any tasks",
        response_model=None,
        responses={200: {"model": Answer | list[Answer]}, **problems(400, 413, 415, 422, 503)},
        openapi_extra=request_body(),
    )
    async def predict_all(call: Request) -> JSONResponse:
        start = time.perf_counter()
        body = await call.body()
        if body:
            _require_json(call)
        requests, many = await run_in_threadpool(checked, body)  # tokenizes the texts
        answers = await batcher.submit(requests)
        for request in requests:
            metrics.predictions.labels(request["task"]).inc()
        metrics.call_seconds.observe(time.perf_counter() - start)
        return JSONResponse(answers if many else answers[0])

    @app.get(
        "/tasks",
        summary="The tasks, with their text columns and labels",
        response_model=None,
        responses={200: {"model": dict[str, TaskInfo]}},
    )
    async def tasks() -> dict[str, Any]:
        return {name: task.to_dict() for name, task in predictor.tasks.items()}

    @app.get("/health", summary="Whether the service answers")
    async def health() -> Health:
        return Health(status="ok", tasks=len(predictor.tasks), waiting=batcher.waiting)

    @app.get(
        "/metrics",
        summary="Counters in Prometheus' format",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers=_PAGE_HEADERS)

    def administrator(sent: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> None:
        """Admits only callers that send the administrator's token."""
        if admin_token is None or options.tasks_root is None:
            raise HTTPException(403, "the tasks of this service are fixed: it has no administrator's token or no root")
        given = b"" if sent is None else sent.credentials.encode("latin-1")  # the bytes that were sent
        if not hmac.compare_digest(given, admin_token.encode()):
            raise HTTPException(401, "not the administrator's token", {"WWW-Authenticate": "Bearer"})

    admin = [Depends(administrator)]

    @app.put(
        "/tasks/{name}",
        status_code=201,
        summary="Add the task in the subfolder of this name",
        response_model=None,
        responses={201: {"model": TaskInfo}, **problems(401, 403, 404, 409, 422)},
        dependencies=admin,
    )
    async def add_task(name: str) -> dict[str, Any]:
        folder = task_folder(Path(options.tasks_root or ""), name)
        if folder is None:
            raise HTTPException(404, f"{name!r} is not a folder of this service's tasks root")

        def add() -> dict[str, Any]:
            if name in predictor.tasks:
                raise HTTPException(409, f"task {name!r} exists: remove it first")
            with _refusals():
                predictor.add_task(name, folder)
            return predictor.tasks[name].to_dict()

        return dict(await batcher.in_worker(add))

    @app.delete(
        "/tasks/{name}",
        status_code=204,
        response_model=None,
        summary="Remove a task",
        responses=problems(401, 403, 404, 422),
        dependencies=admin,
    )
    async def remove_task(name: str) -> None:
        def remove() -> None:
            if name not in predictor.tasks:
                raise HTTPException(404, f"unknown task {name!r}")
            with _refusals():
                predictor.remove_task(name)

        await batcher.in_worker(remove)

    return app


def _require_json(call: Request) -> None:
    given = call.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise HTTPException(415, f"the content type is {given!r:.60}: send application/json")


@contextmanager
def _refusals() -> Iterator[None]:
    """What the predictor refuses is the caller's fault."""
    try:
        yield
    except PalAdaptersError as error:
        raise HTTPException(422, str(error)) from error


def _report_problems(app: FastAPI) -> None:
    """Every error of a call becomes a `Problem` with a status that says whose fault it is."""

    @app.exception_handler(CallError)
    async def bad_request(_: Request, error: CallError) -> JSONResponse:
        return _problem(422, str(error), index=error.index, task=error.task)

    @app.exception_handler(QueueFullError)
    async def busy(_: Request, error: QueueFullError) -> JSONResponse:
        return _problem(503, "too many requests are waiting; try again", headers=_LATER)

    @app.exception_handler(StarletteHTTPException)
    async def rejected(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return _problem(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)  # the server logs it with its traceback; the caller learns nothing about it
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return _problem(500, "internal error")

    @app.exception_handler(BodyError)
    async def malformed(_: Request, error: BodyError) -> JSONResponse:
        return _problem(400, str(error))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, error: ClientDisconnect) -> JSONResponse:
        return _problem(400, "the body is incomplete")


def _problem(status: int, error: str, *, headers: Mapping[str, str] | None = None, **where: Any) -> JSONResponse:
    content = Problem(error=error, **where).model_dump(exclude_none=True)
    return JSONResponse(content, status, headers=dict(headers or {}))
