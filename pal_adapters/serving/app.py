"""The application: routes, status codes and error messages."""

from __future__ import annotations

import hmac
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException

from pal_adapters.errors import ConfigError, PalAdaptersError

from .batcher import Batcher, QueueFullError
from .checks import CallError, check_requests, task_folder
from .interface import PredictorLike
from .metrics import Metrics
from .middleware import BodyLimit, StatusCount
from .options import ServingOptions

_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class PredictionRequest(BaseModel):
    """The name of a task, and the task's text columns as further fields; `GET /tasks` lists both."""

    model_config = ConfigDict(
        extra="allow", json_schema_extra={"examples": [{"task": "sentiment", "text": "a fine film"}]}
    )
    task: str


class Problem(BaseModel):
    """Why a call was rejected; `index` and `task` name the request, if it was one of several."""

    error: str
    index: int | None = None
    task: str | None = None


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

    app = FastAPI(title="pal_adapters", lifespan=lifespan, responses={422: {"model": Problem}})
    app.add_middleware(BodyLimit, max_bytes=options.max_body_bytes)
    app.add_middleware(StatusCount, report=metrics.count_call)
    _report_problems(app)

    @app.post("/predict", summary="Answer one request, or a list of requests for any tasks")
    async def predict_all(body: PredictionRequest | list[PredictionRequest]) -> Any:
        start = time.perf_counter()
        requests = [one.model_dump() for one in (body if isinstance(body, list) else [body])]
        await run_in_threadpool(check_requests, requests, predictor, options)  # tokenizes the texts
        answers = await batcher.submit(requests)
        for request in requests:
            metrics.predictions.labels(request["task"]).inc()
        metrics.call_seconds.observe(time.perf_counter() - start)
        return answers if isinstance(body, list) else answers[0]

    @app.get("/tasks", summary="The tasks, with their text columns and labels")
    async def tasks() -> dict[str, Any]:
        return {name: task.to_dict() for name, task in predictor.tasks.items()}

    @app.get("/health", summary="Whether the service answers")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "tasks": len(predictor.tasks), "waiting": batcher.waiting}

    @app.get("/metrics", summary="Counters in Prometheus' format", response_class=Response)
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers=_PAGE_HEADERS)

    def administrator(authorization: str = Header("")) -> None:
        """Admits only callers that send the administrator's token."""
        if admin_token is None or options.tasks_root is None:
            raise HTTPException(403, "the tasks of this service are fixed: it has no administrator's token or no root")
        expected = f"Bearer {admin_token}".encode()
        if not hmac.compare_digest(authorization.encode(errors="replace"), expected):
            raise HTTPException(401, "not the administrator's token", {"WWW-Authenticate": "Bearer"})

    admin = [Depends(administrator)]

    @app.put(
        "/tasks/{name}", status_code=201, summary="Add the task in the subfolder of this name", dependencies=admin
    )
    async def add_task(name: str) -> dict[str, Any]:
        folder = task_folder(Path(options.tasks_root or ""), name)
        if folder is None:
            raise HTTPException(404, f"{name!r} is not a folder of this service's tasks root")

        def add() -> dict[str, Any]:
            if name in predictor.tasks:
                raise HTTPException(409, f"task {name!r} exists: remove it first")
            try:
                predictor.add_task(name, folder)
            except PalAdaptersError as error:
                raise HTTPException(422, str(error)) from error
            return predictor.tasks[name].to_dict()

        return dict(await batcher.in_worker(add))

    @app.delete("/tasks/{name}", status_code=204, response_model=None, summary="Remove a task", dependencies=admin)
    async def remove_task(name: str) -> None:
        def remove() -> None:
            if name not in predictor.tasks:
                raise HTTPException(404, f"unknown task {name!r}")
            predictor.remove_task(name)

        await batcher.in_worker(remove)

    return app


def _report_problems(app: FastAPI) -> None:
    """Every error of a call becomes a `Problem` with a status that says whose fault it is."""

    @app.exception_handler(CallError)
    async def bad_request(_: Request, error: CallError) -> JSONResponse:
        return _problem(422, str(error), index=error.index, task=error.task)

    @app.exception_handler(QueueFullError)
    async def busy(_: Request, error: QueueFullError) -> JSONResponse:
        return _problem(503, "too many requests are waiting; try again", headers={"Retry-After": "1"})

    @app.exception_handler(StarletteHTTPException)
    async def rejected(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return _problem(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(Exception)  # the server logs it with its traceback; the caller learns nothing about it
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return _problem(500, "internal error")

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = max(error.errors(), key=lambda one: len(one["loc"]))  # in a list, the request at fault
        if first["type"] == "json_invalid":
            return _problem(400, f"the body is not JSON: {first['ctx']['error']}")
        numbers = [part for part in first["loc"] if isinstance(part, int)]
        message = "pass an object with a task and its text columns, or a list of such objects"
        return _problem(422, f"{first['msg']}: {message}", index=numbers[0] if numbers else None)


def _problem(status: int, error: str, *, headers: Mapping[str, str] | None = None, **where: Any) -> JSONResponse:
    content = Problem(error=error, **where).model_dump(exclude_none=True)
    return JSONResponse(content, status, headers=dict(headers or {}))
