"""Serves a trained folder with Ray Serve: replicas on one machine or many, each with one base model and all tasks.

    python examples/serve_ray.py outputs/quickstart --replicas 2 --port 8000

Takes the calls of `pal-adapters serve` at `/predict`. Ray starts the replicas, balances the calls, and restarts what
fails; `@serve.batch` makes one mixed batch of the requests that reach a replica together. Needs the extra `ray`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pal_adapters.cli.main import reported
from pal_adapters.cli.options import PositiveInt, option, parse
from pal_adapters.cli.shared import model_folder
from pal_adapters.multitask import Predictor
from pal_adapters.serving import ServingOptions
from pal_adapters.serving.body import BodyError, read_requests
from pal_adapters.serving.checks import CallError, check_requests

LIMITS = ServingOptions()


@dataclass
class RayOptions:
    replicas: PositiveInt = option("number of replicas", 1)
    cpus: PositiveInt = option("CPU cores of a replica", 1)
    gpus: float = option("GPUs of a replica; may be a fraction", 0.0)
    host: str = option("address to listen on", "127.0.0.1")
    port: int = option("port to listen on", 8000)


class Tasks:
    """One replica: a base model with all tasks."""

    def __init__(self, folder: str, device: str | None = None) -> None:
        self.predictor = Predictor.from_pretrained(folder, device=device)

    @serve.batch(max_batch_size=LIMITS.max_batch, batch_wait_timeout_s=LIMITS.max_wait_ms / 1000)
    async def predict(self, requests: list[Any]) -> list[Any]:
        return [answer.to_dict() for answer in await asyncio.to_thread(self.predictor, requests)]

    async def __call__(self, call: Request) -> Response:
        if int(call.headers.get("content-length", LIMITS.max_body_bytes + 1)) > LIMITS.max_body_bytes:
            return JSONResponse({"error": f"a body needs a length of at most {LIMITS.max_body_bytes} bytes"}, 413)
        try:
            requests, many = read_requests(await call.body())
            await asyncio.to_thread(check_requests, requests, self.predictor, LIMITS)
        except BodyError as error:
            return JSONResponse({"error": str(error)}, 400)
        except CallError as error:
            return JSONResponse({"error": str(error), "index": error.index}, 422)
        answers = await asyncio.gather(*(self.predict(request) for request in requests))
        return JSONResponse(answers if many else answers[0])


def start(folder: str, args: RayOptions, *, blocking: bool) -> Any:
    """Starts the application; returns its handle unless it blocks."""
    serve.start(http_options={"host": args.host, "port": args.port})
    deployment = serve.deployment(
        Tasks, num_replicas=args.replicas, ray_actor_options={"num_cpus": args.cpus, "num_gpus": args.gpus}
    )
    application = deployment.bind(model_folder(folder), "cuda" if args.gpus else None)
    return serve.run(application, name="tasks", route_prefix="/predict", blocking=blocking)


def main(argv: Sequence[str] | None = None) -> int:
    args, given = parse(
        "serve_ray.py", __doc__, argv, RayOptions, folder="a trained folder, where all machines see it"
    )
    return reported("serve_ray.py", lambda: int(start(given.folder, args, blocking=True) is None))


if __name__ == "__main__":
    sys.exit(main())
