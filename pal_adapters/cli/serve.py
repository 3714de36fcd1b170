"""Answers requests over HTTP with a trained folder, until SIGTERM or Ctrl+C.

    pal-adapters serve out --port 8000

Tasks can be added and removed while it runs if --tasks_root is given and the environment variable
PAL_ADAPTERS_ADMIN_TOKEN holds an administrator's token.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pal_adapters.errors import ConfigError
from pal_adapters.serving.options import ServingOptions

from .options import option, parse

ADMIN_TOKEN = "PAL_ADAPTERS_ADMIN_TOKEN"


@dataclass(frozen=True)
class ServeOptions(ServingOptions):
    """The options of `serve`: those of the service, and where it runs."""

    host: str = option("address to listen on; the default accepts calls from this machine only", "127.0.0.1")
    port: int = option("port to listen on; 0 for any free one", 8000)
    device: str | None = option("where to run the model, such as cuda:0", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port {self.port} is not allowed: use a number from 0 to 65535")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command."""
    args, given = parse("pal-adapters serve", __doc__, argv, ServeOptions, folder="a trained folder, or a Hub repo ID")
    # Only here: the help and the checks of the options do without the packages of the extra `serve`.
    from pal_adapters.multitask import Predictor
    from pal_adapters.serving import create_app, serve

    from .shared import model_folder

    token = os.environ.get(ADMIN_TOKEN)
    if args.tasks_root is not None and not token:
        raise ConfigError(f"--tasks_root has no effect without an administrator's token: set {ADMIN_TOKEN}")
    predictor: Any = Predictor.from_pretrained(model_folder(given.folder), device=args.device)
    serve(create_app(predictor, args, admin_token=token or None), host=args.host, port=args.port)
    return 0
