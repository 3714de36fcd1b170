"""Runs the application in this process."""

from __future__ import annotations

import uvicorn
from fastapi import FastAPI

GRACE_SECONDS = 30
"""How long calls in progress may take after SIGTERM or Ctrl+C."""


def serve(app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serves until SIGTERM or Ctrl+C, then answers the calls in progress and returns.

    Args:
        app: The application.
        host: Address to listen on; the default accepts calls from this machine only.
        port: Port to listen on; 0 for any free one, which the log names.
    """
    uvicorn.run(
        app,
        host=host,
        port=port,
        access_log=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        server_header=False,
    )
