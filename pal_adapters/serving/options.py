"""The settings of a service."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pal_adapters.checks import require_int
from pal_adapters.errors import ConfigError


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class ServingOptions:
    """How a service batches, what it accepts, and whether its tasks may change. The fields describe themselves."""

    max_batch: int = _field(32, "largest number of requests in one batch")
    max_wait_ms: float = _field(5.0, "milliseconds that the first request of a batch waits for others")
    max_queue: int = _field(1024, "number of requests that may wait; beyond it, calls get status 503")
    max_body_bytes: int = _field(1_000_000, "largest body of a call, in bytes")
    max_requests: int = _field(256, "largest number of requests in one call")
    max_text_length: int = _field(20_000, "largest number of characters in one request, over all its columns")
    max_new_tokens: int = _field(256, "largest number of tokens that a request may generate")
    tasks_root: str | None = _field(
        None, "folder whose subfolders an administrator may add as tasks while the service runs"
    )

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_body_bytes", "max_requests", "max_text_length", "max_new_tokens"):
            require_int(name, getattr(self, name), minimum=1)
        if not 0 <= self.max_wait_ms <= 60_000:
            raise ConfigError(f"max_wait_ms={self.max_wait_ms!r} is not allowed: use a number from 0 to 60000.")
        if self.max_requests > self.max_queue:
            raise ConfigError(
                f"max_requests={self.max_requests} is not allowed: use at most max_queue={self.max_queue}, otherwise "
                "the largest call could never be accepted."
            )
        if self.tasks_root is not None and not Path(self.tasks_root).is_dir():
            raise ConfigError(f"tasks_root={self.tasks_root!r} is not a folder.")
